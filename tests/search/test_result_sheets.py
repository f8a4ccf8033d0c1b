import pathlib

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data.preparation.sheets import GAP, SIDE
from keras_cluster_mask.search import Match, SearchResult, result_sheet

FIELD = (238, 238, 238)


def field(sheet, row_top, column):
    """The field of a picture whose row begins at a height."""
    left = GAP + column * (SIDE + GAP)
    return np.asarray(sheet)[row_top : row_top + SIDE, left : left + SIDE]


@pytest.fixture
def matches(tmp_path):
    """Pictures of one colour each, of any shape."""
    found = []
    for row in range(7):
        path = tmp_path / f"{row}.png"
        Image.new("RGB", (30 + 40 * row, 200), (30 * row, 0, 0)).save(path)
        found.append(Match(path.name, 0.9 - 0.1 * row, row, str(path)))
    return found


def test_what_was_found_is_shown_in_order_beside_the_query(matches, tmp_path):
    query = Image.new("RGB", (50, 50), (0, 0, 250))
    results = [
        SearchResult("words", matches[::-1]),
        SearchResult(query, matches, is_image=True),
        SearchResult(tmp_path / "3.png", matches, is_image=True),
        SearchResult(np.asarray(query), matches, is_image=True),
    ]
    for index, result in enumerate(results):
        sheet = result_sheet(result)
        middles = [
            field(sheet, GAP, column)[SIDE // 2, SIDE // 2].tolist()
            for column in range(8)
        ]
        levels = [30 * match.row for match in result.matches]
        assert middles[1:] == [[level, 0, 0] for level in levels]
        if index:
            assert middles[0] == [[0, 0, 250], [90, 0, 0], [0, 0, 250]][index - 1]
    assert field(result_sheet(results[0]), GAP, 0).min() < 150
    assert result_sheet(results).height > 3 * SIDE


def test_more_than_fit_go_on_below_with_nothing_beside_them(matches):
    sheet = result_sheet(SearchResult("words", matches), columns=3)
    assert sheet.width == GAP + 4 * (SIDE + GAP)
    height = (sheet.height - GAP) // 3
    for row in (1, 2):
        assert (field(sheet, GAP + row * height, 0) == 255).all()
    assert field(sheet, GAP + 2 * height, 1)[SIDE // 2, SIDE // 2].tolist() == [
        180,
        0,
        0,
    ]
    assert (field(sheet, GAP + 2 * height, 2) == 255).all()


def test_pictures_that_are_gone_are_grey_fields_with_words(matches, tmp_path):
    pathlib.Path(matches[1].path).unlink()
    (tmp_path / "2.png").write_bytes(b"broken")
    shard = Match("in a shard", 0.1, 9, None)
    gone = SearchResult(tmp_path / "gone.png", [*matches[1:3], shard], is_image=True)
    sheet = result_sheet(gone)
    for column in range(4):
        assert tuple(field(sheet, GAP, column)[0, 0]) == FIELD
        assert field(sheet, GAP, column).min() < 150


def test_long_and_foreign_texts_stay_in_their_place(matches):
    texts = ["word " * 300, "x" * 3000, "собака на пляже " * 9, "猫" * 900, "🐶", "\n"]
    long = [match._replace(key="folder/" * 40 + match.key) for match in matches]
    sheet = np.asarray(result_sheet([SearchResult(text, long) for text in texts]))
    for column in range(9):
        gap = sheet[:, column * (SIDE + GAP) :][:, : GAP - 1]
        assert (gap == 255).all()


def test_what_makes_no_sense_is_named(matches):
    with pytest.raises(ValueError, match=r"at least one. Received: results=\[\]"):
        result_sheet([])
    with pytest.raises(ValueError, match=r"at least 1\. Received: columns=0"):
        result_sheet(SearchResult("words", matches), columns=0)
