import pytest

from keras_cluster_mask.data import files
from keras_cluster_mask.data.paths import open_source
from tests.data.reading import read_samples

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


def test_images_as_the_package_datasets_writes_them(write):
    images = [{"bytes": b"j", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    captions = [["one", "two"], [], None]
    path = write({"image": images, "captions": captions})
    ((first,), faults) = read_samples(path)
    assert (first.image, first.captions) == (b"j", ("one", "two"))
    assert faults == [("00000001", "no caption"), ("00000002", "no image")]
    samples, _ = read_samples(path, wants_caption=False)
    assert [each.path.rpartition("/")[2] for each in samples] == ["", "b.jpg"]


def test_a_replaced_file_is_read_again(write):
    write(COLUMNS)
    assert open_source(write(COLUMNS))[1]["caption"] == "no 1"
    changed = {**COLUMNS, "caption": [f"new {i}" for i in range(7)]}
    assert open_source(write(changed))[1]["caption"] == "new 1"


def test_truncated_files_and_damaged_pages_are_damage(write, read_damaged):
    content = write(COLUMNS).read_bytes()
    for damaged in (content[:-50], content[50:], b""):
        path = write(COLUMNS)
        path.write_bytes(damaged)
        assert read_damaged(path) == ([], 1)
    columns = {"image": [b"%02d" % n * 2500 for n in range(50)], "caption": ["a"] * 50}
    options = {"compression": "none", "use_dictionary": False}
    path = write(columns, row_group_size=10, **options)
    content = bytearray(path.read_bytes())
    content[120_000:129_000] = b"\xff" * 9000
    path.write_bytes(content)
    assert read_damaged(path) == ([f"{i:08}" for i in range(20)], 20)


def test_files_are_closed(write, monkeypatch):
    source = open_source(write(COLUMNS))
    open_file, opened = files.open_file, []

    def recorded(path):
        opened.append(open_file(path))
        return opened[-1]

    monkeypatch.setattr(files, "open_file", recorded)
    assert source[0]["caption"] == "no 0"
    assert [file.closed for file in opened] == [True]
