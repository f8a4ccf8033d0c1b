import keras
import pytest

import keras_cluster_mask as kcm
from tests.helpers import CONTEXT, VOCABULARY


@pytest.fixture(scope="package")
def model():
    """A CLIP of 16 pixels and 6 tokens that has learned nothing."""
    keras.utils.set_random_seed(0)
    backbone = kcm.models.clip_backbone("tiny", 16, VOCABULARY, CONTEXT, 4)
    return kcm.ContrastiveModel.from_backbone(backbone, masking=kcm.RandomMasking(0.5))


@pytest.fixture(scope="package")
def tokenizer():
    """Letters to ids between a start and an end, cut off and filled up."""

    def tokenizer(texts):
        rows = []
        for text in texts:
            ids = [1 + ord(x) % (VOCABULARY - 3) for x in text[: CONTEXT - 2]]
            row = [VOCABULARY - 2, *ids, VOCABULARY - 1]
            rows.append(row + [0] * (CONTEXT - len(row)))
        return rows

    return tokenizer
