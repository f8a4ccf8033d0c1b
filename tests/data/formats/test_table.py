import csv
import io
import json
import random

import pytest

from keras_cluster_mask.data import read_captions, split

pytestmark = pytest.mark.any_backend

ROW = {"file_name": "a/1.jpg", "text": 'He said: "Hi, you\nthere"', "n": "1"}
OTHER = {"file_name": "2.jpg", "text": "zwei\tÄpfel", "n": "2"}
TABLES = {
    "x.csv": 'file_name,text,n\na/1.jpg,"He said: ""Hi, you\nthere""",1\n'
    "2.jpg,zwei\tÄpfel,2\n",
    "x.tsv": 'file_name\ttext\tn\na/1.jpg\t"He said: ""Hi, you\nthere"""\t1\n'
    '2.jpg\t"zwei\tÄpfel"\t2\n',
    "x.jsonl": f"{json.dumps(ROW)}\n{json.dumps(OTHER, ensure_ascii=False)}\n",
}
NO_CSV = "a row that is not CSV in UTF-8"
NO_JSON = "a line that is not a JSON object"


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("change", ["byte order mark", "CRLF", "empty lines", "no end"])
def test_what_editors_change_does_not_matter(write, read_all, name, change):
    content = TABLES[name].encode()
    if change == "byte order mark":
        content = b"\xef\xbb\xbf" + content
    elif change == "CRLF":
        # Newlines within a cell stay.
        content = content.replace(b"\n", b"\r\n").replace(b"you\r\n", b"you\n")
    elif change == "empty lines":
        content = content.replace(b"2.jpg", b"\n\n2.jpg", name != "x.jsonl") + b"\n\n"
    else:
        content = content.removesuffix(b"\n")
    assert [row for _, row in read_all(write(name, content))[0]] == [ROW, OTHER]


def test_random_tables_are_read_as_python_writes_them(write, read_all):
    draw = random.Random(0)

    def cell(letters):
        return "".join(draw.choices(letters, k=draw.randrange(6)))

    # In a TSV, a cell with newlines and tabs may be several rows.
    for name, delimiter, other in (("x.csv", ",", "\t"), ("x.tsv", "\t", ",")):
        letters = f'ab{other}"\né猫 \u2028'
        letters += delimiter if name == "x.csv" else ""
        rows = [[f"{i}.jpg", cell(letters), cell(letters)] for i in range(300)]
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter).writerows([["f", "a", "b"], *rows])
        samples, faults = read_all(write(name, file.getvalue()))
        # A cell without letters is no field.
        assert [[row.get(x, "") for x in "fab"] for _, row in samples] == rows
        assert faults == []


def test_columns_of_one_name_are_a_list(write):
    table = write("x.csv", "image,caption,caption\n0.png,one,two\n1.png,three,\n")
    assert read_captions(table) == ["one", "two", "three"]


def test_a_row_may_be_short_but_not_wide(write, read_all):
    path = write("x.csv", "file_name,text\n1.jpg\n2.jpg,two,,\n3.jpg,three, or four\n")
    samples, faults = read_all(path)
    assert samples == [
        ("1.jpg", {"file_name": "1.jpg"}),
        ("2.jpg", {"file_name": "2.jpg", "text": "two"}),
    ]
    # "three" would be half of a caption.
    assert faults == [("2", "more cells than columns")]


@pytest.mark.parametrize("content", ["", "file_name,text\n", "file_name,text"])
def test_a_table_without_rows_has_no_samples(write, read_all, content):
    assert read_all(write("x.csv", content)) == ([], [])


@pytest.mark.parametrize("caption", ['"open', '"two" birds', 'two "birds"', '"a""b" c'])
def test_quotes_in_a_tsv_without_quoting_are_part_of_the_caption(
    write, read_all, caption
):
    captions = ["one", caption, "three", 'closed"', "five"]
    rows = [f"{i}.jpg\t{text}" for i, text in enumerate(captions)]
    samples, faults = read_all(write("x.tsv", "\n".join(["f\ttext", *rows])))
    assert [fields["text"] for _, fields in samples] == captions
    assert faults == []


def test_a_quoted_cell_of_a_tsv_may_have_newlines(write, read_all):
    for columns in (("text", "f"), ("f", "text")):
        row = {"f": "1.jpg", "text": 'two\n"lines"'}
        cells = {"f": "1.jpg", "text": '"two\n""lines"""'}
        lines = ["\t".join(columns), "\t".join(cells[name] for name in columns)]
        ((_, fields),), _ = read_all(write("x.tsv", "\n".join(lines)))
        assert fields == row


def test_a_first_line_that_names_no_field_is_shown(write):
    path = write("x.csv", "1.png,one\n2.png,two\n")
    columns = r"\['1.png', 'one'\]"
    for read in (split, read_captions):
        with pytest.raises(
            ValueError, match=rf"first line .*with the fields {columns}"
        ):
            read(path)


# === Broken rows ===


@pytest.mark.parametrize(
    "broken",
    [b"10.jpg,caf\xe9", b'10.jpg,"open', b'"10.jpg,open', b'10.jpg,"te"xt', b'"1"0,t'],
    ids=["Latin-1", "open quote", "open key", "text after a quote", "quote in a key"],
)
@pytest.mark.parametrize("caption", ["plain %d", '"quoted, ""%d"""'])
@pytest.mark.parametrize(("place", "end"), [(10, b""), (4999, b""), (4999, b"\n")])
def test_a_broken_row_costs_one_sample(write, read_all, broken, caption, place, end):
    lines = [b"%d.jpg," % i + (caption % i).encode() for i in range(5000)]
    lines[place] = broken
    path = write("x.csv", b"\n".join([b"file_name,text", *lines]) + end)
    samples, faults = read_all(path)
    expected = [f"{i}.jpg" for i in range(5000) if i != place]
    assert [key for key, _ in samples] == expected
    assert [fault for _, fault in faults] == [NO_CSV]


def test_a_broken_line_of_json_costs_one_sample(write, read_all):
    lines = [
        b'{"file_name": "1.jpg", "text": "one"}',
        b'{"file_name": "2.jpg", "text": "tw',
        b'{"file_name": "\xff"}',
        b"[1, 2]",
        b"[" * 100_000,
        b'{"n": ' + b"1" * 5000 + b"}",
        b'{"file_name": null, "text": ["a", "b"], "n": 0}',
        b'{"file_name": "\\ud800.jpg"}',
        b"{}",
    ]
    samples, faults = read_all(write("x.jsonl", b"\n".join(lines)))
    assert faults == [(f"{i}", NO_JSON) for i in range(1, 6)]
    assert samples == [
        ("1.jpg", {"file_name": "1.jpg", "text": "one"}),
        ("None", {"text": ["a", "b"], "n": 0}),
        ("?.jpg", {"file_name": "\ud800.jpg"}),
        ("8", {}),
    ]


def test_captions_may_be_longer_than_the_limit_of_python(write, read_all):
    # The limit of the module csv is 131,072.
    text = "x, " * 100_000
    row = {"file_name": "1.jpg", "text": text}
    for name, content in (
        ("x.csv", f'file_name,text\n1.jpg,"{text}"\n2.jpg,two\n'),
        ("x.tsv", f"file_name\ttext\n1.jpg\t{text}\n2.jpg\ttwo\n"),
        ("x.jsonl", json.dumps(row) + '\n{"file_name": "2.jpg", "text": "two"}\n'),
    ):
        samples, faults = read_all(write(name, content))
        assert [fields["text"] for _, fields in samples] == [text, "two"]
        assert faults == []


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("x.csv", "f,text\na.jpg,{}\nc.jpg,three"),
        ("x.csv", 'f,text\na.jpg,"{}"\nc.jpg,three'),
        ("x.jsonl", '{"f": "a.jpg", "text": "{}"}\n{"f": "c.jpg", "text": "three"}'),
    ],
)
def test_a_row_that_is_too_long_costs_one_sample(write, read_all, name, lines):
    content = lines.replace("{}", "x" * 3_000_000)
    samples, faults = read_all(write(name, content))
    assert [key for key, _ in samples] == ["c.jpg"]
    assert len(faults) == 1


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_table_in_utf_16_is_not_in_utf_8(write, read_damaged, encoding):
    for name in ("x.csv", "x.tsv"):
        content = f"\ufeff{TABLES[name]}".encode(encoding)
        assert read_damaged(write(name, content)) == ([], 1)


def test_a_broken_first_line_is_damage(write, read_damaged):
    for content in (b"\xff\n1,2\n", b'"a\nb,c\n', b"f,text\rold,Mac\r"):
        assert read_damaged(write("x.csv", content)) == ([], 1)
