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
    """Letters to ids, cut off and filled up; the last id ends the text."""

    def tokenizer(texts):
        rows = []
        for text in texts:
            ids = [1 + byte % (VOCABULARY - 2) for byte in text[: CONTEXT - 1]]
            rows.append([*ids, VOCABULARY - 1, *[0] * (CONTEXT - 1 - len(ids))])
        return rows

    return tokenizer
