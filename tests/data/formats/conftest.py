import pytest

from keras_cluster_mask.data.paths import open_source
from keras_cluster_mask.data.samples import ERROR, FILE, KEY, filled

# What the fixture `shard` holds.
ROWS = [
    {"key": "k0", "image": "0.png", "caption": 'He said: "Hi, you\nthere"'},
    {"key": "k1", "image": "1.png", "caption": "zwei\tÄpfel"},
    {"key": "k2", "image": "2.png", "caption": "three"},
]


def read_all_of(path):
    """Reads all samples of a file, in any order; returns them and their faults."""
    source = open_source(path)
    items = source.__getitems__([*range(len(source))][::-1])[::-1]
    samples, faults = [], []
    for item in items:
        key, file = item.pop(KEY), item.pop(FILE)
        assert file == next(iter(source.stamps))
        if ERROR in item:
            faults.append((key, item[ERROR].args[0]))
        else:
            samples.append((key, filled(item)))
    return samples, faults


@pytest.fixture
def read_all():
    return read_all_of


@pytest.fixture
def read_damaged():
    """Returns the keys before the damage of a file, and the number of lost samples."""

    def read_damaged(path):
        with pytest.warns(UserWarning, match=rf"{path} is damaged .*are lost"):
            samples, faults = read_all_of(path)
        assert all(reason.startswith("damaged ") for _, reason in faults)
        return [key for key, _ in samples], len(faults)

    return read_damaged


@pytest.fixture
def write(tmp_path):
    """Writes a file of str or bytes; returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(params=["x.tar", "x.csv", "x.tsv", "x.jsonl", "x.parquet"])
def shard(request, write_rows, write_tar):
    """A shard of `ROWS` in each format."""
    name = request.param
    if name == "x.tar":
        return write_tar(
            name,
            [
                (f"{row['key']}.{field}", row[field].encode())
                for row in ROWS
                for field in ("image", "caption")
            ],
        )
    return write_rows(name, ROWS)
