import pytest

from keras_cluster_mask.data import files
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.samples import DamagedShard, Fields

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.any_backend

COLUMNS = {
    "image": [b"j%d" % i for i in range(7)],
    "caption": [f"no {i}" for i in range(7)],
}


@pytest.fixture
def write(tmp_path):
    def write(columns, name="x.parquet", **options):
        path = tmp_path / name
        pq.write_table(pa.table(columns), path, **options)
        return path

    return write


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_rows_are_what_pyarrow_reads_whatever_the_groups(write, read_all, rows):
    columns = {**COLUMNS, "id": [f"k{i}" for i in range(7)]}
    path = write(columns, row_group_size=rows)
    expected = pq.read_table(path).to_pylist()
    assert read_all(path) == ([(row["id"], row) for row in expected], [])


def test_the_key_is_a_column_or_the_number_of_the_row(write, read_all):
    for name in ("__key__", "key", "image_id", "id"):
        samples, _ = read_all(write({**COLUMNS, name: list(range(7))}))
        assert [key for key, _ in samples] == [str(i) for i in range(7)]
    samples, _ = read_all(write(COLUMNS, row_group_size=3))
    assert [key for key, _ in samples] == [f"{i:08}" for i in range(7)]


def test_images_as_the_package_datasets_writes_them(write, read_all):
    images = [{"bytes": b"j", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    captions = [["one", "two"], [], None]
    samples, _ = read_all(write({"image": images, "captions": captions}))
    assert [fields for _, fields in samples] == [
        {"image": b"j", "captions": ["one", "two"]},
        {"image": "b.jpg"},
        {},
    ]


def test_a_replaced_file_is_read_again(write):
    write(COLUMNS)
    index = open_index(write(COLUMNS), Fields())
    assert next(index.read([1])).captions == ("no 1",)
    changed = {**COLUMNS, "caption": [f"new {i}" for i in range(7)]}
    index = open_index(write(changed), Fields())
    assert next(index.read([1])).captions == ("new 1",)


def test_truncated_files_and_damaged_pages_are_damage(write, scan):
    content = write(COLUMNS).read_bytes()
    for damaged in (content[:-50], content[50:], b""):
        path = write(COLUMNS)
        path.write_bytes(damaged)
        with pytest.raises(DamagedShard, match=r"x\.parquet is damaged"):
            list(scan(path))
    columns = {"image": [b"x" * 5000] * 50, "caption": ["a"] * 50}
    options = {"compression": "none", "use_dictionary": False}
    path = write(columns, row_group_size=10, **options)
    content = bytearray(path.read_bytes())
    content[120_000:129_000] = b"\xff" * 9000
    path.write_bytes(content)
    keys = []
    with pytest.raises(DamagedShard, match=r"x\.parquet is damaged") as error:
        keys.extend(scan(path))
    assert error.value.args[3] == 20 / 50
    assert keys == [f"{i:08}" for i in range(20)]


def test_a_group_that_cannot_be_read_is_read_again_and_files_are_closed(
    write, monkeypatch
):
    monkeypatch.setattr(files, "RETRY_AFTER", (0.0,))
    index = open_index(write(COLUMNS), Fields())
    open_file, opened = files.open_file, []
    errors = [OSError(5, "the connection was reset")]

    def fails_once(path):
        if errors:
            raise errors.pop()
        opened.append(open_file(path))
        return opened[-1]

    monkeypatch.setattr(files, "open_file", fails_once)
    assert next(index.read([0])).captions == ("no 0",)
    assert errors == []
    assert [file.closed for file in opened] == [True]
