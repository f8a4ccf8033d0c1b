import json
import re

import pytest
import tables

pytestmark = pytest.mark.any_backend

FIRST = [
    {"method": "none", "step (ms)": 8182, "/ none": "1.000", "score": "52.0 ± 0.6"},
    {"method": "half", "step (ms)": 4109.5, "/ none": "0.505", "score": "-0.0"},
]
SECOND = [
    {"batch": 8, "method": "none", "/ none": "1.000", "share": "0.25 %"},
    {"batch": 32, "method": "none", "/ none": "1.000", "share": "0.35 %"},
    {"batch": 8, "method": "random", "/ none": "0.545", "share": "1.35 %"},
]


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Small results in place of those of the repository."""
    folder = tmp_path / "results"
    (folder / "study").mkdir(parents=True)
    monkeypatch.setattr(tables, "RESULTS", folder)
    (folder / "first.json").write_text(json.dumps({"rows": FIRST}))
    content = {"tables": {"chosen": {"rows": SECOND}}, "rest": SECOND[1:]}
    (folder / "study" / "second.json").write_text(json.dumps(content))


def table_of(*lines):
    """The rows of a table as lists of entries."""
    text = "\n".join(("<!-- table " + "\n".join(lines), "-->", "<!-- end -->"))
    shown = [line for line in tables.rendered(text).splitlines() if line[:1] == "|"]
    assert set(shown.pop(1)) == set("| -")
    return [[entry.strip() for entry in line.split("|")[1:-1]] for line in shown]


def value_of(content):
    shown = tables.rendered(f"It is <!-- value {content} -->old<!-- end -->.")
    start, _, shown = shown.partition(f"It is <!-- value {content} -->")
    assert start == ""
    return shown.removesuffix("<!-- end -->.")


def test_pages_of_the_repository_agree_with_the_results():
    pages = tables.pages()
    assert "".join(tables.rewrite(page, check=True) for page in pages) == ""
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    made = {page.name for page, text in texts.items() if tables.MARK.search(text)}
    assert {"quality.md", "speed.md", "README.md"} <= made


@pytest.mark.usefixtures("results")
def test_numbers_are_written_and_a_changed_one_fails_the_check(run, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- table first.json\ncolumns: method; step (ms)\n-->\n<!-- end -->\n\n"
        "A step: <!-- value first.json; none; step (ms) {,.0f} --><!-- end --> ms.\n"
    )
    run(tables, page)
    right = page.read_text()
    assert right.endswith("8,182<!-- end --> ms.\n")
    run(tables, "--check", page)
    wrong = right.replace("8,182", "8,183")
    page.write_text(wrong)
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"run benchmarks/tables\.py"):
        run(tables, "--check", page)
    assert "\n-A step:" in capsys.readouterr().out
    assert page.read_text() == wrong


@pytest.mark.usefixtures("results")
def test_a_table_has_the_rows_and_columns_that_are_named_in_their_order():
    assert table_of("first.json", "columns: method; / none") == [
        ["method", "/ none"],
        ["none", "1.000"],
        ["half", "0.505"],
    ]
    assert table_of(
        "first.json",
        "columns: method as reads; / none {.2f}; step (ms) {,.0f} as time",
        "rows: half as 50 %;",
        "  none",
    ) == [
        ["reads", "/ none", "time"],
        ["50 %", "0.51", "4,110"],
        ["none", "1.00", "8,182"],
    ]
    rows = table_of("study/second.json#chosen", "columns: method; batch")
    assert rows[1:] == [["none", "8"], ["none", "32"], ["random", "8"]]


@pytest.mark.usefixtures("results")
def test_files_are_joined_by_the_first_column_or_by_rows():
    assert table_of(
        "first.json as A; study/second.json#rest as B", "columns: method; / none"
    ) == [
        ["method", "A", "B"],
        ["none", "1.000", "1.000"],
        ["half", "0.505", ""],
        ["random", "", "0.545"],
    ]
    assert table_of(
        "study/second.json#chosen as A; study/second.json#rest as B",
        "columns: method as reads; share; / none {.1f} as time",
        "rows: none + 32 as all; random + 8; none + 8",
    ) == [
        ["reads", "A: share", "A: time", "B: share", "B: time"],
        ["all", "0.35 %", "1.0", "0.35 %", "1.0"],
        ["random + 8", "1.35 %", "0.5", "1.35 %", "0.5"],
        ["none + 8", "0.25 %", "1.0", "", ""],
    ]


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("first.json; none; score", "52.0&nbsp;±&nbsp;0.6"),
        ("first.json; half; / none {.2f}", "0.51"),
        ("first.json; half; score {z.1f}", "0.0"),
        ("study/second.json#chosen; 32; share {.1f}", "0.4 %"),
        ("study/second.json#chosen; none + 8; share", "0.25 %"),
    ],
)
def test_a_value_is_that_of_its_row_and_column(content, shown):
    assert value_of(content) == shown


# A value as its content, a table as its lines; and a part of the message.
REFUSED = [
    ("third.json; none; / none", "file of benchmarks/results"),
    ("first.json#rest; none; / none", "key of first.json"),
    ("first.json; all; / none", "row of first.json"),
    ("first.json; none; time", "column of first.json"),
    ("study/second.json#chosen; 8; share", "no other row has"),
    ("first.json; none; score {.1f}", "needs a number"),
    ("first.json; none", "FILE; ROW; COLUMN"),
    ("first.json; none; / none as time", "NAME {FORMAT} as TITLE"),
    (["first.json", "rows: none"], "columns: ..."),
    (["first.json", "columns: method; / none; score as / none"], "differ in name"),
]


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_what_cannot_be_shown_is_an_error(content, message):
    with pytest.raises(ValueError, match=rf"(?s){re.escape(message)}.*Received: "):
        value_of(content) if isinstance(content, str) else table_of(*content)
