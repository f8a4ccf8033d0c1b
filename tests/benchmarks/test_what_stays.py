"""What masks leave of images, against small cases worked out by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import what_stays

pytestmark = pytest.mark.any_backend

STRIPES = np.tile([1.0, -1.0], 8)
WAVES = np.repeat([1.0, -1.0], 8)


def test_numbers_are_those_of_a_case_worked_out_by_hand():
    # 2 x 2 patches of 16 pixels: two alike, one unlike them, one flat.
    patterns = [STRIPES, 2 * STRIPES, WAVES, 0 * WAVES]
    means = [0.0, 0.0, 4.0, 4.0]
    patches = np.stack([x + m for x, m in zip(patterns, means)])[:, :, None]
    found = what_stays.numbers(np.array([True, False, False, False]), patches, 2)
    assert found == pytest.approx(
        {
            "kept": 0.25,
            "look-alike": (1 + 0 + 0) / 3,
            # The one that stays is 4 away from two of the four, their mean 2 from all.
            "colors": 1 - 32 / 16,
        }
    )


def test_a_blank_image_and_a_whole_one_have_no_such_number():
    found = what_stays.numbers(np.array([True, True]), np.zeros((2, 4, 3)), 1)
    assert found["kept"] == 1.0
    assert all(np.isnan(found[key]) for key in set(found) - {"kept"})


def test_patches_are_cut_row_by_row():
    image = np.arange(4 * 4 * 3).reshape(1, 4, 4, 3)
    patches = what_stays.cut(image, 2)
    assert patches.shape == (1, 4, 4, 3)
    np.testing.assert_array_equal(patches[0, 1, 0], image[0, 0, 2])
    np.testing.assert_array_equal(patches[0, 2, 3], image[0, 3, 1])


def test_blocks_explain_less_of_a_slope_than_random_patches():
    slope = np.linspace(0, 1, 48, dtype="float32")
    images = np.broadcast_to(slope[:, None], (20, 48, 48, 3))
    found = {name: what_stays.measure(name, images, 6) for name in ("random", "block")}
    assert {x["kept"] for x in found.values()} == {0.5}
    assert 1 - found["block"]["colors"] > 1.5 * (1 - found["random"]["colors"])
