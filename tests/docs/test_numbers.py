"""The measured numbers on pages are those of `benchmarks/results`.

`numbers.toml` beside this file says where each number is. The digits on a page decide
how the result is rounded. `67%` is a fraction of 1, and `67 %` is a number with a unit.
"""

import json
import re
import tomllib
from decimal import ROUND_HALF_UP, Decimal

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.any_backend

RESULTS = ROOT / "benchmarks" / "results"
LISTED = tomllib.loads((ROOT / "tests/docs/numbers.toml").read_text("utf-8"))
PHRASES = [(page, *each) for page, of in LISTED["phrases"].items() for each in of]
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?%?")


def text_of(page):
    """The page, with plain spaces in place of `&nbsp;`."""
    return (ROOT / page).read_text(encoding="utf-8").replace("&nbsp;", " ")


def numbers(text):
    found = NUMBER.findall(str(text))
    return [Decimal(each.replace(",", "").replace("%", "e-2")) for each in found]


def is_rounded(printed, measured):
    """Whether the numbers of a text are those of a result, rounded to its digits."""
    shown, found = numbers(printed), numbers(measured)
    if not shown or len(shown) != len(found):
        return printed == measured
    return all(f.quantize(s, ROUND_HALF_UP) == s for f, s in zip(found, shown))


def measured(file, row, column):
    """A row's entry in a column of a result, empty if the result has no such row."""
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    name = set(filter(None, row.split(" + ")))
    found = [each for each in rows if name <= {str(entry) for entry in each.values()}]
    assert len(found) <= 1, f"{row!r} names several rows of {file}"
    assert any(column in each for each in rows), f"{file} has no column {column!r}"
    return found[0].get(column, "") if found else ""


@pytest.mark.parametrize(("page", "phrase", "file", "row", "column"), PHRASES)
def test_a_number_in_a_sentence_is_that_of_the_results(page, phrase, file, row, column):
    assert " ".join(text_of(page).split()).count(phrase) == 1
    assert is_rounded(phrase, measured(file, row, column))


def tables_of(page):
    """The tables of a page, as lists of rows of cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", text_of(page), re.MULTILINE)
    lines = [[line[1:-1].split("|") for line in each.splitlines()] for each in blocks]
    return [[[cell.strip() for cell in row] for row in each] for each in lines]


@pytest.mark.parametrize("listed", LISTED["tables"], ids=lambda each: each["page"])
def test_the_cells_of_a_table_are_those_of_the_results(listed):
    header = [listed["first_column"], *listed["columns"]]
    (table,) = (each for each in tables_of(listed["page"]) if each[0] == header)
    names, *columns = zip(*table[2:])
    assert names == tuple(listed["rows"])
    for (file, column), cells in zip(listed["columns"].values(), columns):
        for row, cell in zip(listed["rows"].values(), cells):
            assert is_rounded(cell, measured(file, row, column)), (row, column)


@pytest.mark.parametrize(
    ("printed", "result", "is_right"),
    [
        ("0.51", "0.505", True),
        ("0.50", "0.505", False),
        ("8,182", 8182.4, True),
        ("67%", 0.666, True),
        ("0.4 %", "0.35 %", True),
        ("52.0 ± 0.6", "52.0 ± 0.7", False),
        ("52.0", "52.0 ± 0.6", False),
        ("", "0.5", False),
    ],
)
def test_the_digits_of_a_page_decide_how_a_result_is_rounded(printed, result, is_right):
    assert is_rounded(printed, result) == is_right
