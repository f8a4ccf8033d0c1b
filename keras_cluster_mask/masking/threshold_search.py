"""Finds the threshold that leaves out a given fraction of the patches."""

import numpy as np

from keras_cluster_mask.masking.similarity import STEPS

TOLERANCE = 0.01


def find_threshold(similarities, mask_ratio, max_visible):
    """Finds the threshold whose mean mask ratio is nearest to the given one.

    Similarities are multiples of `1 / STEPS`, so there are `2 STEPS + 1` different
    thresholds, half a step above each multiple. The mask ratio falls as the threshold
    rises, so a bisection tests at most 14 of them.

    Args:
        similarities: `(images, N)` array.
        mask_ratio: Float, the fraction of patches to leave out on average.
        max_visible: Integer. The maximum number of patches that are kept per image.

    Returns:
        The threshold, a float.

    Raises:
        ValueError: If no threshold comes within `TOLERANCE`.
    """

    def threshold(step):
        return (step + 0.5) / STEPS

    def ratio(step):
        visible = np.sum(similarities <= threshold(step), axis=1)
        return 1 - np.mean(np.clip(visible, 1, max_visible)) / similarities.shape[1]

    # Invariant: `low` leaves out at least `mask_ratio`, and `high` less.
    low, high = -STEPS - 1, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if ratio(middle) >= mask_ratio:
            low = middle
        else:
            high = middle
    best = min(low, high, key=lambda step: abs(ratio(step) - mask_ratio))
    if abs(ratio(best) - mask_ratio) > TOLERANCE:
        raise ValueError(
            "`mask_ratio` cannot be reached on average with these images. The nearest "
            f"ratios of any threshold are {ratio(low):.3f} and {ratio(high):.3f}: pass "
            "one of them, pass more images, or set `threshold` yourself. Received: "
            f"mask_ratio={mask_ratio}, {len(similarities)} images with "
            f"{similarities.shape[1]} patches"
        )
    return min(max(threshold(best), -1.0), 1.0)
