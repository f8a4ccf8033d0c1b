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
    compiled_step,
    draw_noise,
    numpy,
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


@pytest.mark.one_case
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_large_batch_is_compared_in_blocks_with_the_same_result(
    strategy, monkeypatch
):
    rng = np.random.default_rng(35)
    images = textured(rng, 7, 32, 48, 3)
    noise = rng.random((7, 24), dtype="float32")
    masking = STRATEGIES[strategy](
        patch_size=8, embedding_weight=0.3, num_prefix_tokens=1
    )
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
def test_data_format_defaults_to_the_configured_one(strategy, data_format):
    assert STRATEGIES[strategy](patch_size=8).data_format == data_format


# === The mix of pixels and tokens ===


@pytest.mark.one_case
@pytest.mark.parametrize("strategy", BUDGET)
def test_a_schedule_sets_the_weight_of_each_training_step(strategy):
    rng = np.random.default_rng(24)
    images = textured(rng, ROWS, 32, 48, 3)
    tokens = tokens_of(ROWS, 1 + 24, dim=32)
    noise = draw_noise(rng, ROWS, 24)
    scheduled = STRATEGIES[strategy](patch_size=8, embedding_weight=ramp())
    chosen = []
    for step in range(6):
        fixed = STRATEGIES[strategy](patch_size=8, embedding_weight=min(step / 4, 1.0))
        expected = numpy(*fixed.select(images, tokens, noise))
        inputs = dict(images=images, tokens=tokens, noise=noise)
        assert_selects(scheduled, expected, **inputs)
        chosen.append(expected[0])
        # A call that draws its noise is a step. Inference, a selection, and a call with
        # the noise of another are none.
        scheduled(tokens, images=images)
        assert int(scheduled.step) == step
        scheduled(tokens, images=images, training=True, noise=noise)
        assert int(scheduled.step) == step
        scheduled(tokens, images=images, training=True)
    assert np.any(chosen[0] != chosen[4])


@pytest.mark.one_case
@pytest.mark.parametrize("strategy", BUDGET)
def test_step_advances_in_a_compiled_training_step(strategy):
    masking = STRATEGIES[strategy](patch_size=8, embedding_weight=ramp())
    step = compiled_step(masking)
    for _ in range(3):
        step()
    assert int(masking.step) == 3
