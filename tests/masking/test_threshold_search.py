import numpy as np
import pytest

from keras_cluster_mask.masking.threshold_search import (
    TOLERANCE,
    find_threshold,
)

pytestmark = pytest.mark.any_backend

STEP = 2.0**-12


def random_similarities(seed, images=50, num_patches=20):
    values = np.random.default_rng(seed).beta(2, 3, (images, num_patches)) * 2 - 1
    return (np.round(values / STEP) * STEP).astype("float32")


def mask_ratio_at(similarities, threshold, max_visible):
    visible = np.clip((similarities <= threshold).sum(axis=1), 1, max_visible)
    return 1.0 - visible.mean() / similarities.shape[1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mask_ratio", [0.21, 0.3, 0.5, 0.777, 0.94])
def test_finds_the_nearest_ratio_of_all_thresholds(seed, mask_ratio):
    similarities, max_visible = random_similarities(seed), 16
    every = (np.arange(-4097, 4097) + 0.5) * STEP
    visible = [np.searchsorted(np.sort(row), every, "right") for row in similarities]
    ratios = 1.0 - np.clip(visible, 1, max_visible).mean(axis=0) / 20
    found = find_threshold(similarities, mask_ratio, max_visible)
    best = np.abs(ratios - mask_ratio).min()
    reached = mask_ratio_at(similarities, found, max_visible)
    assert abs(reached - mask_ratio) == pytest.approx(best, abs=1e-12)
    assert -1.0 <= found <= 1.0


def test_thresholds_lie_between_similarities():
    found = find_threshold(random_similarities(0), 0.5, 20)
    assert found / STEP % 1.0 == 0.5


@pytest.mark.parametrize(
    ("mask_ratio", "max_visible"), [(0.05, 16), (0.185, 16), (0.965, 20), (0.99, 20)]
)
def test_out_of_reach_says_what_is_within(mask_ratio, max_visible):
    similarities = random_similarities(1)
    message = r"nearest ratios of any threshold are .*Received: mask_ratio="
    with pytest.raises(ValueError, match=message):
        find_threshold(similarities, mask_ratio, max_visible)


def test_misses_by_no_more_than_the_tolerance():
    # Each image all alike or all unlike: only 0, 0.5 and 1 - 1/N are within reach.
    similarities = np.repeat([[0.0], [0.5]], 10, axis=1).astype("float32")
    assert find_threshold(similarities, 0.45, 10) == pytest.approx(0.25, abs=0.26)
    with pytest.raises(ValueError, match="cannot be reached"):
        find_threshold(similarities, 0.45 + 1.5 * TOLERANCE, 10)
