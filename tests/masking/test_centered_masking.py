import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.masking import masking_reference as reference
from tests.masking.images import CLEAR, assert_selects, draw_noise

ROWS = 48
# Rows, columns. Odd, even, and not square.
GRIDS = [(4, 4), (5, 5), (3, 7), (7, 3), (6, 4), (2, 12), (1, 9)]


@pytest.mark.one_case
@pytest.mark.parametrize("grid", GRIDS)
def test_selects_as_the_reference_wherever_the_cut_is_clear(grid):
    rng = np.random.default_rng(1)
    num_patches = grid[0] * grid[1]
    shares = []
    for mask_ratio, variance in [(0.5, 0.2), (0.75, 0.1), (0.3, 0.8)]:
        noise = draw_noise(rng, ROWS, num_patches)
        score = reference.centered_score(noise, grid, variance)
        K = reference.kept_count(num_patches, mask_ratio)
        clear = reference.gap_at_cut(-score, noise, K) > CLEAR
        masking = kcm.CenteredMasking(mask_ratio, variance, grid=grid)
        expected = reference.select_centered(noise, grid, mask_ratio, variance)
        assert_selects(masking, expected, clear, noise=noise)
        shares.append(clear.mean())
    assert np.mean(shares) > 0.95
