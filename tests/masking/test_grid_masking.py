import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.masking import masking_reference as reference
from tests.masking.images import assert_selects, draw_noise, numpy

ROWS = 48
# Rows, columns and window.
GRIDS = [
    (4, 4, 2),
    (6, 4, 2),
    (2, 10, 2),
    (9, 3, 3),
    (3, 9, 3),
    (5, 5, 5),
    (4, 8, 4),
    (3, 5, 1),
]


@pytest.mark.one_case
@pytest.mark.parametrize(("rows", "columns", "window"), GRIDS)
def test_selects_as_the_reference_and_also_where_noise_ties_one_of_every_window(
    rows, columns, window
):
    noise = draw_noise(np.random.default_rng(1), ROWS, rows * columns)
    masking = kcm.GridMasking(window, grid=(rows, columns))
    expected = reference.select_grid(noise, (rows, columns), window)
    assert_selects(masking, expected, noise=noise)
    ties = np.random.default_rng(2).integers(0, 3, (ROWS, rows * columns)) / 4
    indices, visible = numpy(*masking.select(noise=ties.astype("float32")))
    assert visible.all()
    assert indices.shape[1] == rows * columns // window**2
    for kept in indices:
        windows = kept // columns // window * columns + kept % columns // window
        assert len(set(windows)) == len(kept)
