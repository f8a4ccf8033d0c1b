"""Weights from and to open_clip, against its own models."""

import functools
import re

import keras
import keras_hub
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.towers import l2_normalize
from keras_cluster_mask.interop import (
    load_open_clip,
    open_clip_state_dict,
    save_open_clip,
)
from tests.helpers import (
    as_trained,
    assert_close,
    assert_same_values,
    reloaded,
    to_numpy,
)
from tests.interop.open_clip_models import (
    arrays,
    batch,
    embeddings,
    load,
    our_embeddings,
    tiny,
    tiny_backbone,
    tiny_config,
)


def assert_same_weights(actual, expected):
    assert_same_values(actual, expected)
    for name, value in expected.items():
        assert actual[name].dtype == "float32"
        assert actual[name].shape == value.shape, name


# === Embeddings ===


@pytest.mark.one_case
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_embeddings_are_those_of_open_clip(quick_gelu):
    reference = tiny(quick_gelu=quick_gelu)
    state = reference.state_dict()
    model = load_open_clip(state, tiny_config(quick_gelu))
    expected = embeddings(reference, *batch())
    assert_close(our_embeddings(model, *batch()), expected, atol=2e-6)
    scale = reference.logit_scale.exp().item()
    assert to_numpy(model.head.scale) == pytest.approx(scale)
    wrong = load_open_clip(state, tiny_config(not quick_gelu))
    for ours, theirs in zip(our_embeddings(wrong, *batch()), expected):
        assert np.abs(ours - theirs).max() > 1e-4


@pytest.mark.any_backend
def test_epsilons_are_those_of_open_clip(tmp_path):
    reference = tiny()
    import torch

    with torch.no_grad():
        # Activations so small that epsilons of 1e-5 and 1e-6 differ in the results.
        for name, weight in reference.named_parameters():
            if re.search("embedding|out_proj|c_proj", name):
                weight *= 2e-3
    images, ids = batch()
    model = load(reference.state_dict())
    _, expected = embeddings(reference, images, ids)
    for each in (model, reloaded(model, tmp_path)):
        _, actual = our_embeddings(each, images, ids)
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    larger = kcm.models.with_image_size(model.backbone, 32)
    assert larger.text_encoder.layer_norm.epsilon == 1e-5
    model.backbone.text_encoder.layer_norm.epsilon = 1e-6
    actual = l2_normalize(model.backbone.get_text_embeddings(ids))
    assert np.abs(to_numpy(actual) - expected).max() > 1e-3


# === Sizes ===


@pytest.mark.any_backend
@pytest.mark.parametrize("data_format", ["channels_first"], indirect=True)
def test_images_may_come_channels_first(data_format):
    reference, (images, ids) = tiny(), batch()
    expected, _ = embeddings(reference, images, ids)
    model = load(reference.state_dict())
    assert tuple(model.backbone.vision_encoder.image_shape) == (3, 16, 16)
    if keras.backend.backend() != "tensorflow":  # which has no such convolution
        actual, _ = our_embeddings(model, images.transpose(0, 3, 1, 2), ids)
        np.testing.assert_allclose(actual, expected, atol=2e-6)
    assert_same_weights(open_clip_state_dict(model), arrays(reference))


# === Round trips ===


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_keras_gets_back_every_bit(tmp_path, loss):
    backbone = tiny_backbone()
    model = as_trained(kcm.ContrastiveModel.from_backbone(backbone, loss=loss))
    save_open_clip(model, tmp_path / "clip.safetensors")
    back = load_open_clip(tmp_path / "clip.safetensors")
    assert back.head.loss == loss
    name = back.backbone.name
    assert back.backbone.get_config() == {**backbone.get_config(), "name": name}
    assert [x.path for x in back.weights] == [x.path for x in model.weights]
    assert_same_values(back.weights, model.weights)


@pytest.mark.any_backend
def test_a_state_dict_does_not_change_with_the_model():
    backbone = load(tiny().state_dict()).backbone
    state = open_clip_state_dict(backbone)
    before = state["visual.proj"].copy()
    backbone.vision_projection.kernel.assign(np.zeros_like(before))
    np.testing.assert_array_equal(state["visual.proj"], before)


# === Errors ===


@pytest.mark.any_backend
def test_bad_input_is_refused_by_name():
    state, config = arrays(tiny()), tiny_config()
    with pytest.raises(ValueError, match=r"`model`.*Received: model="):
        open_clip_state_dict(keras.Sequential())
    with pytest.raises(ValueError, match=r"`config`.*Received: config=None"):
        load_open_clip(state)
    with pytest.raises(FileNotFoundError, match=r"tags.*not downloaded.*'ViT-B-32'"):
        load_open_clip("ViT-B-32", "laion2b_s34b_b79k")
    for bias in (np.float32(np.nan), np.zeros(2, "f4")):
        with pytest.raises(ValueError, match=r"Received: source of(.|\n)*logit_bias"):
            load_open_clip({**state, "logit_bias": bias}, config)
    with pytest.raises(ValueError, match=r"Received: source of(.|\n)*: logit_bias"):
        load_open_clip(state, {**config, "init_logit_bias": -10})


@pytest.mark.any_backend
def test_patches_without_positions_are_refused():
    encoder = keras_hub.models.CLIPVisionEncoder(
        8, 64, 1, 1, 64, image_shape=(16, 16, 3)
    )
    text = keras_hub.models.CLIPTextEncoder(40, 64, 64, 1, 1, 64, max_sequence_length=7)
    backbone = keras_hub.models.CLIPBackbone(encoder, text, 24)
    with pytest.raises(ValueError, match=r"position.*Received: position ids \[0, 0"):
        open_clip_state_dict(backbone)
    kcm.ContrastiveModel.from_backbone(backbone)
    assert open_clip_state_dict(backbone)["visual.proj"].shape == (64, 24)


# === The bias of a sigmoid loss ===


def assert_starts_at(head, scale, bias):
    assert to_numpy(head.scale) == pytest.approx(scale)
    assert to_numpy(head.logit_bias) == bias


@pytest.mark.any_backend
def test_open_clips_temperature_and_bias_are_loaded_whatever_their_shape():
    config = {**tiny_config(), "init_logit_bias": -7.0}
    for nonscalar in (False, True):
        reference = tiny(init_logit_bias=-7.0, nonscalar_logit_scale=nonscalar)
        reference.logit_scale.data.fill_(1.5)
        reference.logit_bias.data.fill_(-7.0)
        load = functools.partial(load_open_clip, reference.state_dict(), config)
        assert_starts_at(load().head, np.exp(1.5), -7.0)
        head = kcm.models.ContrastiveHead(
            "sigmoid", initial_logit_bias=-1.0, initial_temperature=0.5
        )
        assert_starts_at(load(head=head).head, 2.0, -1.0)
        assert load(loss="softmax").head.logit_bias is None
        assert load(head="linear").head.loss == "sigmoid"
