import keras
import pytest

import keras_cluster_mask as kcm
from tests.helpers import CONTEXT, VOCABULARY, letters_as_tokens


@pytest.fixture(scope="package")
def model():
    """A CLIP of 16 pixels and 6 tokens that has learned nothing."""
    keras.utils.set_random_seed(0)
    backbone = kcm.models.clip_backbone("tiny", 16, VOCABULARY, CONTEXT, 4)
    return kcm.ContrastiveModel.from_backbone(backbone, masking=kcm.RandomMasking(0.5))


@pytest.fixture(scope="package")
def tokenizer():
    return letters_as_tokens
