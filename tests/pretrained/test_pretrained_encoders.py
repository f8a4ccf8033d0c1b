"""Encoders with pre-trained weights, against those of transformers."""

import keras
import keras_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.families import IMAGENET_MEAN, IMAGENET_STD
from keras_cluster_mask.encoders.surgery import find_embedding_layer
from tests.conftest import DATASETS
from tests.helpers import compiled, random_noise, to_numpy

pytestmark = pytest.mark.slow

SIZE = 112
NUM_PATCHES = 64
POSITION_ERROR = 5e-3
TEXTS = ["a cat", "a cup of coffee on a wooden table", "the launch of a rocket"]


@pytest.fixture(scope="module")
def photographs():
    """Normalized photographs."""
    paths = sorted((DATASETS / "photographs").glob("*.jpg"))
    images = [Image.open(path).resize((SIZE, SIZE)) for path in paths]
    pixels = np.stack(images) / 255
    return ((pixels - IMAGENET_MEAN) / IMAGENET_STD).astype("float32")


@pytest.fixture(scope="module")
def reference(encoders):
    return transformers.Dinov2Model.from_pretrained(encoders / "dinov2_small").eval()


@pytest.fixture(scope="module")
def dinov2(encoders, reference):
    """The encoder of keras_hub, with positions that torch has interpolated.

    The bicubic kernel of torch has a = -0.75, that of JAX and TensorFlow a = -0.5.
    """
    backbone = keras_hub.models.DINOV2Backbone.from_preset(
        str(encoders / "dinov2_small"), image_shape=(SIZE, SIZE, 3)
    )
    tokens = torch.zeros(1, 1 + NUM_PATCHES, 384)
    with torch.no_grad():
        table = reference.embeddings.interpolate_pos_encoding(tokens, SIZE, SIZE)
    positions = find_embedding_layer(backbone).interpolated_position_embeddings
    error = np.abs(to_numpy(positions) - table.numpy()).max()
    assert error < (1e-5 if keras.backend.backend() == "torch" else POSITION_ERROR)
    positions.assign(table.numpy())
    return backbone


def channels_first(images):
    return torch.tensor(images).movedim(-1, 1)


@torch.no_grad()
def test_dinov2_is_that_of_transformers(dinov2, reference, photographs):
    found = to_numpy(compiled(lambda: dinov2(photographs, training=False))())
    expected = reference(channels_first(photographs)).last_hidden_state
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "masking",
    [
        kcm.RandomMasking(0.5),
        kcm.ClusterMasking(0.5, patch_size=14, min_mask_ratio=0.25, threshold=0.3),
    ],
    ids=["random", "threshold"],
)
@torch.no_grad()
def test_a_masked_encoder_is_the_encoder_of_visible_tokens(
    masking, dinov2, reference, photographs
):
    noise = random_noise(len(photographs), NUM_PATCHES)
    indices, visible = masking.select(images=photographs, noise=noise)
    indices, visible = (to_numpy(x).astype("int64") for x in (indices, visible))
    encoder = kcm.with_masking(dinov2, masking)
    run = compiled(lambda: encoder(photographs, training=True, noise=noise))
    tokens = reference.embeddings(channels_first(photographs))
    for row, found in enumerate(to_numpy(run())):
        shown = visible[row].astype(bool)
        of_image = tokens[row, [0, *(1 + indices[row, shown])]]
        expected = reference.encoder(of_image[None]).last_hidden_state[0]
        np.testing.assert_allclose(
            found[[True, *shown]], reference.layernorm(expected), atol=1e-4
        )


@pytest.mark.parametrize(
    ("activation", "of_tokens", "of_embeddings"),
    [("gelu_pytorch_tanh", 1e-5, 1e-6), ("gelu", 5e-3, 5e-4)],
)
@torch.no_grad()
def test_bert_differs_from_that_of_transformers_by_its_gelu(
    encoders, activation, of_tokens, of_embeddings
):
    folder = str(encoders / "all_minilm_l6_v2")
    embedder = keras_hub.models.TextEmbedder.from_preset(folder)
    embedder.preprocessor.sequence_length = 24
    inputs = embedder.preprocessor(TEXTS)
    found = compiled(lambda: embedder.backbone(inputs, training=False))()
    found = to_numpy(found["sequence_output"])
    reference = transformers.BertModel.from_pretrained(folder, hidden_act=activation)
    ids, mask = (
        torch.tensor(to_numpy(inputs[name])).long()
        for name in ("token_ids", "padding_mask")
    )
    expected = reference.eval()(ids, mask).last_hidden_state.numpy()
    weights = mask[..., None].numpy()
    assert np.abs((found - expected) * weights).max() < of_tokens
    one, other = (np.sum(x * weights, axis=1) for x in (found, expected))
    one, other = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (one, other))
    assert np.abs(one - other).max() < of_embeddings
