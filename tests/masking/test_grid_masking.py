import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.masking import masking_reference as reference
from tests.masking.images import assert_selects, draw_noise, numpy
from tests.masking.test_cluster_masking import FALSE_ALARM, chi_square, tokens_of

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


@pytest.mark.parametrize(("rows", "columns", "window"), GRIDS)
def test_selects_as_the_reference(rows, columns, window):
    noise = draw_noise(np.random.default_rng(1), ROWS, rows * columns)
    masking = kcm.GridMasking(window, grid=(rows, columns))
    expected = reference.select_grid(noise, (rows, columns), window)
    assert_selects(masking, expected, noise=noise)


def windows_of(indices, columns, window):
    return indices // columns // window * columns + indices % columns // window


@pytest.mark.parametrize(("rows", "columns", "window"), GRIDS)
def test_keeps_exactly_one_patch_of_every_window_even_where_noise_ties(
    rows, columns, window
):
    noise = np.random.default_rng(2).integers(0, 3, (ROWS, rows * columns)) / 4
    masking = kcm.GridMasking(window, grid=(rows, columns))
    indices, visible = numpy(*masking.select(noise=noise.astype("float32")))
    assert visible.all()
    assert indices.shape[1] == rows * columns // window**2
    for kept in indices:
        assert len(set(windows_of(kept, columns, window))) == len(kept)


def test_keeps_every_place_of_a_window_equally_often():
    masking = kcm.GridMasking(2, num_prefix_tokens=0, seed=3)
    indices, _ = numpy(*masking.select(tokens=np.zeros((6000, 16, 1), "float32")))
    counts = np.bincount(indices.ravel(), minlength=16)
    assert chi_square(counts, 6000, 4) > FALSE_ALARM


def test_reports_the_share_that_its_window_leaves_out():
    masking = kcm.GridMasking(3, num_prefix_tokens=1)
    kept = masking(tokens_of(2, 1 + 36), training=True)
    assert kept.shape == (2, 1 + 4, 6)
    np.testing.assert_allclose(numpy(masking.last_mask_ratio), 8 / 9, atol=1e-6)


@pytest.mark.any_backend
@pytest.mark.parametrize("grid", [(3, 4), (4, 3)])
def test_refuses_a_grid_that_its_window_does_not_divide(grid):
    masking = kcm.GridMasking(2, num_prefix_tokens=0)
    images = np.zeros((2, grid[0] * 4, grid[1] * 4, 3), "uint8")
    message = r"`window` must divide.*Received: window=2, rows=\d, columns=\d"
    with pytest.raises(ValueError, match=message):
        masking(tokens_of(2, 12), images=images, training=True)


@pytest.mark.any_backend
@pytest.mark.parametrize("window", [0, -2, 2.0, 0.5, "two", None])
def test_refuses_a_window_that_is_not_a_positive_integer(window):
    with pytest.raises(ValueError, match=r"`window` must be .*Received: window="):
        kcm.GridMasking(window)


@pytest.mark.any_backend
def test_refuses_a_mask_ratio_since_the_window_sets_it():
    message = r"`mask_ratio`.*`window`.*Received: mask_ratio=0.5"
    with pytest.raises(ValueError, match=message):
        kcm.GridMasking(mask_ratio=0.5)
