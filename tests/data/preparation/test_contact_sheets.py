import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data.preparation import contact_sheet
from keras_cluster_mask.data.preparation.sheets import SIDE, Cell, draw_sheet


def cells(path, rows, columns):
    """The fields of pictures, by their place."""
    image = np.asarray(Image.open(path))
    step = (image.shape[1] - 12) // columns
    height = (image.shape[0] - 12) // rows
    return [
        image[12 + row * height :][:SIDE, 12 + column * step :][:, :SIDE]
        for row in range(rows)
        for column in range(columns)
    ]


def levels(path, rows, columns):
    return [int(cell[SIDE // 2, SIDE // 2, 0]) for cell in cells(path, rows, columns)]


def test_the_first_samples_are_shown_in_order(write_pairs, tmp_path):
    shards = [write_pairs("a.tar", 0, 4), write_pairs("b.tar", 4, 9)]
    to = tmp_path / "new" / "sheet.png"
    assert contact_sheet(shards, to, rows=2, columns=3) == 6
    assert levels(to, 2, 3) == [0, 1, 2, 3, 4, 5]


def test_a_seed_draws_each_sample_as_often(write_pairs, tmp_path):
    shards = [write_pairs("a.tar", 0, 6), write_pairs("b.tar", 6, 6)]
    counts = np.zeros(12)
    for seed in range(60):
        contact_sheet(shards, tmp_path / "x.png", rows=1, columns=4, seed=seed)
        shown = levels(tmp_path / "x.png", 1, 4)
        assert shown == sorted(set(shown))
        counts[shown] += 1
    # 20 of 60 each; a standard deviation is 3.7.
    assert counts.min() > 5
    assert counts.max() < 38
    first = (tmp_path / "x.png").read_bytes()
    contact_sheet(shards, tmp_path / "x.png", rows=1, columns=4, seed=59)
    assert (tmp_path / "x.png").read_bytes() == first


def test_fewer_samples_than_fields_are_all_shown(write_pairs, tmp_path):
    assert contact_sheet(write_pairs("a.tar", 0, 3), tmp_path / "x.png") == 3


def test_a_broken_picture_is_a_field_with_words(write_tar, noise, tmp_path):
    files = [("1.png", noise(1)[:200]), ("1.txt", b"a caption")]
    assert contact_sheet(write_tar("a.tar", files), tmp_path / "x.png", columns=1) == 1
    (cell,) = cells(tmp_path / "x.png", 1, 1)
    assert cell[0, 0].tolist() == [238, 238, 238]
    assert cell.min() < 150


def test_long_captions_stay_in_their_column():
    long = ["word " * 60, "x" * 300, "猫" * 200, "line\nline\ttab\x00nul", ""]
    sheet = np.asarray(draw_sheet([[Cell("", text, "label " * 20) for text in long]]))
    for column in range(len(long) + 1):
        gap = sheet[:, column * (SIDE + 12) :][:, :11]
        assert (gap == 255).all()
    assert (sheet[-10:] == 255).all()
    # Something is written below each but the last.
    below = [sheet[SIDE + 36 :, 12 + i * (SIDE + 12) :][:, :SIDE] for i in range(5)]
    assert [part.min() < 100 for part in below] == [True, True, True, True, False]


def test_what_makes_no_sense_is_named(write_tar, tmp_path):
    empty = write_tar("a.tar", [("1.txt", b"text")])
    with pytest.raises(ValueError, match=r"`source` must hold .* Received: .*a\.tar"):
        contact_sheet(empty, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"`to` must end in \.png. Received: x\.jpg"):
        contact_sheet(empty, "x.jpg")
