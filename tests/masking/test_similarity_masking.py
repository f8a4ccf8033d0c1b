"""What all strategies share that compare patches."""

import functools

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.masking import similarity_masking
from tests.helpers import assert_same_values
from tests.masking.images import (
    assert_selects,
    compiled_select,
    compiled_step,
    draw_noise,
    numpy,
    photographs,
    ramp,
    textured,
    tokens_of,
)

ROWS = 32

STRATEGIES = {
    "cluster": kcm.ClusterMasking,
    "threshold": functools.partial(
        kcm.ClusterMasking, min_mask_ratio=0.3, threshold=0.14
    ),
    "kmeans": kcm.KMeansMasking,
    "edge": kcm.EdgeMasking,
}
BUDGET = [name for name in STRATEGIES if name != "threshold"]


# === Images ===


@pytest.mark.any_backend
@pytest.mark.parametrize("strategy", BUDGET)
def test_the_scale_and_origin_of_pixels_do_not_matter(strategy):
    noise = draw_noise(np.random.default_rng(33), ROWS, 24)
    images = photographs(32, 48, ROWS).astype("float32")
    select = compiled_select(STRATEGIES[strategy](8))
    expected = numpy(select(images=images, noise=noise)[0])
    for changed in (images / 255.0, (images - 127.5) / 127.5, 300.0 - images):
        indices = numpy(select(images=changed.astype("float32"), noise=noise)[0])
        # Rounding may decide where a decision is close.
        assert np.mean((indices == expected).all(axis=1)) > 0.9


@pytest.mark.one_case
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_large_batch_is_compared_in_blocks_with_the_same_result(
    strategy, monkeypatch
):
    rng = np.random.default_rng(35)
    images = textured(rng, 7, 32, 48, 3)
    noise = rng.random((7, 24), dtype="float32")
    masking = STRATEGIES[strategy](8, embedding_weight=0.3, num_prefix_tokens=1)
    inputs = {"images": images, "noise": noise, "tokens": tokens_of(7, 25)}
    expected = masking.select(**inputs)
    compare, sizes = masking.similarity_to_anchors, []

    def watched(images, anchors, tokens):
        sizes.append((images.shape[0], tokens.shape[0]))
        return compare(images, anchors, tokens)

    masking.similarity_to_anchors = watched
    monkeypatch.setattr(similarity_masking, "MAX_VALUES", 3 * 32 * 48 * 3 + 1)
    assert_same_values(masking.select(**inputs), expected)
    # Compiled code has a plan of its own for memory.
    blocks = [(3, 3), (3, 3), (1, 1)]
    on_torch = keras.backend.backend() == "torch"
    assert sizes == (blocks if on_torch else [(7, 7)])


@pytest.mark.any_backend
@pytest.mark.parametrize("strategy", BUDGET)
def test_data_format_defaults_to_the_configured_one(strategy):
    before = keras.config.image_data_format()
    try:
        keras.config.set_image_data_format("channels_first")
        assert STRATEGIES[strategy](8).data_format == "channels_first"
    finally:
        keras.config.set_image_data_format(before)
    assert STRATEGIES[strategy](8).data_format == before


# === The mix of pixels and tokens ===


@pytest.mark.one_case
@pytest.mark.parametrize("strategy", BUDGET)
def test_a_schedule_sets_the_weight_of_each_training_step(strategy):
    rng = np.random.default_rng(24)
    images = textured(rng, ROWS, 32, 48, 3)
    tokens = tokens_of(ROWS, 1 + 24, dim=32)
    noise = draw_noise(rng, ROWS, 24)
    scheduled = STRATEGIES[strategy](8, embedding_weight=ramp())
    chosen = []
    for step in range(6):
        fixed = STRATEGIES[strategy](8, embedding_weight=min(step / 4, 1.0))
        expected = numpy(*fixed.select(images, tokens, noise))
        inputs = dict(images=images, tokens=tokens, noise=noise)
        assert_selects(scheduled, expected, **inputs)
        chosen.append(expected[0])
        # Neither inference nor looking advances the step, only training.
        scheduled(tokens, images=images)
        assert int(scheduled.step) == step
        scheduled(tokens, images=images, training=True, noise=noise)
    assert np.any(chosen[0] != chosen[4])


@pytest.mark.one_case
@pytest.mark.parametrize("strategy", BUDGET)
def test_step_advances_in_a_compiled_training_step(strategy):
    masking = STRATEGIES[strategy](8, embedding_weight=ramp())
    step = compiled_step(masking)
    for _ in range(3):
        step()
    assert int(masking.step) == 3


# === Errors ===


@pytest.mark.any_backend
@pytest.mark.parametrize("strategy", BUDGET)
@pytest.mark.parametrize(
    ("options", "images", "received"),
    [
        ({"embedding_weight": 1.1}, None, "embedding_weight"),
        ({"embedding_weight": -0.1}, None, "embedding_weight"),
        ({"data_format": "NHWC"}, None, "data_format"),
        *(({"patch_size": x}, None, "patch_size") for x in (0, None)),
        ({}, (2, 30, 32, 3), "height=30"),
        ({}, (2, 32, 30, 3), "width=30"),
        ({"data_format": "channels_first"}, (2, 3, 30, 32), "height=30"),
        ({"data_format": "channels_first"}, (2, 3, 32, 30), "width=30"),
        *(({}, x, "images.shape") for x in ((2, 32, 32), (2, 1, 32, 32, 3))),
        ({}, None, "images"),
        ({"embedding_weight": 0.5}, (2, 32, 32, 3), "tokens"),
    ],
)
def test_refuses_and_says_what_was_received(strategy, options, images, received):
    images = None if images is None else np.zeros(images, "uint8")
    name = received.split("=")[0].split(".")[0]
    message = rf"(?s)`?{name}`? .*Received: {received}"
    with pytest.raises(ValueError, match=message):
        STRATEGIES[strategy](**{"patch_size": 8, **options}).select(
            images, noise=np.zeros((2, 16), "float32")
        )
