import json

import pytest

from keras_cluster_mask.data.sources import ShardError, find_shards, read_samples
from keras_cluster_mask.data.sources.manifest import ROWS

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


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(content)
        return path

    return write


def rows(path, fields=None):
    """The samples of a manifest without their keys."""
    samples = list(read_samples(path, fields))
    for sample in samples:
        del sample["__key__"]
    return samples


@pytest.mark.parametrize("name", TABLES)
def test_a_row_is_a_sample_also_with_quotes_and_newlines(write, name):
    path = write(name, TABLES[name])
    assert rows(path) == [ROW, OTHER]
    assert [each["__key__"] for each in read_samples(path)] == ["a/1.jpg", "2.jpg"]
    assert rows(path, {"n"}) == [{"n": "1"}, {"n": "2"}]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("change", ["mark", "lines", "empty", "no end"])
def test_what_editors_do_to_a_table_does_not_matter(write, name, change):
    content = TABLES[name].encode()
    if change == "mark":
        content = b"\xef\xbb\xbf" + content
    elif change == "lines":
        # Those within a cell are its own.
        content = content.replace(b"\n", b"\r\n").replace(b"you\r\n", b"you\n")
    elif change == "empty":
        content = content.replace(b"2.jpg", b"\n\n2.jpg", name != "x.jsonl") + b"\n\n"
    else:
        content = content.removesuffix(b"\n")
    assert rows(write(name, content)) == [ROW, OTHER]


def test_a_row_may_be_short_but_not_wide(write):
    path = write("x.csv", "file_name,text\n1.jpg\n2.jpg,two,,\n3.jpg,three, or four\n")
    assert list(read_samples(path)) == [
        {"__key__": "1.jpg", "file_name": "1.jpg"},
        {"__key__": "2.jpg", "file_name": "2.jpg", "text": "two"},
        # "three" would be half of a caption.
        {
            "__key__": "3.jpg",
            "file_name": "3.jpg",
            "__fault__": "more cells than columns",
        },
    ]


def test_a_broken_line_of_json_is_one_broken_sample(write):
    lines = [
        b'{"file_name": "1.jpg", "text": "one"}',
        b'{"file_name": "2.jpg", "text": "tw',
        b'{"file_name": "\xff"}',
        b"[1, 2]",
        b"[" * 100_000,
        b'{"file_name": null, "text": ["a", "b"], "n": 3}',
        b'{"file_name": "\\ud800.jpg"}',
        b"{}",
    ]
    samples = list(read_samples(write("x.jsonl", b"\n".join(lines))))
    fault = "a line that is not a JSON object"
    assert samples == [
        {"__key__": "1.jpg", "file_name": "1.jpg", "text": "one"},
        *({"__key__": f"row {i}", "__fault__": fault} for i in range(1, 5)),
        {"__key__": "None", "text": ["a", "b"], "n": 3},
        {"__key__": "?.jpg", "file_name": "\ud800.jpg"},
        {"__key__": "row 7"},
    ]


QUOTE, UTF_8 = "a row with a quote that does not fit", "a row that is not UTF-8"


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (b'"b".jpg,two', QUOTE),
        (b'b.jpg,"without end', QUOTE),
        (b"b.jpg,\xff", UTF_8),
        (b'b.jpg,"one\n\xff\nthree"', UTF_8),
    ],
)
@pytest.mark.parametrize("end", [b"c.jpg,three\n", b'c.jpg,"th\nree"\n', b""])
def test_a_broken_row_of_a_table_costs_this_row_alone(write, broken, fault, end):
    content = b"file_name,text\na.jpg,one\n" + broken + b"\n" + end
    first, second, *others = read_samples(write("x.csv", content))
    assert first["text"] == "one"
    assert second["__fault__"] == fault
    assert [each["__key__"] for each in others] == ["c.jpg"] * bool(end)
    assert not any("__fault__" in each for each in others)


def test_a_broken_first_line_is_damage(write):
    for content in (b"\xff\xfe\n1,2\n", b'"a\nb,c\n'):
        with pytest.raises(ShardError, match="at its start"):
            list(read_samples(write("x.csv", content)))


@pytest.mark.parametrize("content", ["", "file_name,text\n", "file_name,text"])
def test_a_table_without_rows_has_no_samples(write, content):
    assert list(read_samples(write("x.csv", content))) == []


@pytest.mark.parametrize("count", [ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 3])
@pytest.mark.parametrize("name", TABLES)
def test_each_part_of_a_long_manifest_reads_its_own_rows(write, name, count):
    if name == "x.jsonl":
        lines = [json.dumps({"f": f"{i}.jpg", "é": "x\n" * i}) for i in range(count)]
    else:
        mark = "," if name == "x.csv" else "\t"
        lines = [
            f'{i}.jpg{mark}"é' + "\n" * (i % 3) + '"' + "\n" * (i % 5 == 0)
            for i in range(count)
        ]
        lines.insert(0, f"f{mark}é")
    parts = find_shards(write(name, "\n".join(lines)))
    assert len(parts) == -(-count // ROWS)
    assert len({str(part) for part in parts}) == len(parts)
    for number, part in enumerate(parts):
        first = number * ROWS
        expected = [f"{i}.jpg" for i in range(first, min(first + ROWS, count))]
        # In any order and more than once.
        for _ in range(2):
            assert [sample["__key__"] for sample in part.read()] == expected


@pytest.mark.parametrize("place", [ROWS - 1, ROWS, ROWS + 1])
def test_a_broken_row_is_found_wherever_the_parts_meet(write, place):
    lines = ["f,text", *(f"{i}.jpg,text" for i in range(2 * ROWS))]
    lines[1 + place] = 'x.jpg,"te"xt'
    parts = find_shards(write("x.csv", "\n".join(lines)))
    read = [sample for part in parts for sample in part.read()]
    assert [n for n, sample in enumerate(read) if "__fault__" in sample] == [place]
    keys = [f"{i}.jpg" for i in range(2 * ROWS)]
    keys[place] = f"row {place}"
    assert [sample["__key__"] for sample in read] == keys


def test_names_of_files_are_meant_from_the_manifests_folder(write, tmp_path):
    (shard,) = find_shards(write("x.csv", "file_name,text\n"))
    assert shard.path_of("a/b.jpg") == str(tmp_path / "a/b.jpg")
    assert shard.path_of("/a/b.jpg") == "/a/b.jpg"
    assert shard.path_of("s3://a/b.jpg") == "s3://a/b.jpg"
