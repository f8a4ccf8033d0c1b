import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.masking import masking_reference as reference
from tests.masking.images import (
    FALSE_ALARM,
    assert_selects,
    chi_square,
    draw_noise,
    numpy,
)

ROWS = 48
# Rows, columns. Odd, even, and too flat for a square of half the patches.
GRIDS = [(4, 4), (5, 5), (3, 7), (7, 3), (6, 4), (2, 12), (12, 2), (1, 9)]


@pytest.mark.one_case
@pytest.mark.parametrize("grid", GRIDS)
def test_selects_as_the_reference(grid):
    rng = np.random.default_rng(1)
    for mask_ratio in (0.0, 0.3, 0.5, 0.75, 0.9):
        noise = draw_noise(rng, ROWS, grid[0] * grid[1])
        masking = kcm.BlockMasking(mask_ratio, grid=grid)
        expected = reference.select_block(noise, grid, mask_ratio)
        assert_selects(masking, expected, noise=noise)


@pytest.mark.any_backend
def test_the_surplus_of_a_square_goes_at_random_wherever_the_square_is():
    # 5 of 16 patches: a square of 3 x 3 at one of four places loses 4 patches. The
    # noise of the first patch draws the place, which must not decide whether it stays.
    masking = kcm.BlockMasking(0.68, num_prefix_tokens=0, seed=5)
    noise = masking.draw(24000, 16)
    indices, _ = numpy(*masking.select(tokens=np.zeros((24000, 16, 1)), noise=noise))
    assert indices.shape[1] == 5
    place = (numpy(noise)[:, 0] * 4).astype(int)
    for number, corner in enumerate([0, 1, 4, 5]):
        kept = np.bincount(indices[place == number].ravel(), minlength=16)
        square = corner + np.array([0, 1, 2, 4, 5, 6, 8, 9, 10])
        assert kept.sum() == kept[square].sum()
        draws = np.sum(place == number)
        assert chi_square(kept[square], draws, 5) > FALSE_ALARM
