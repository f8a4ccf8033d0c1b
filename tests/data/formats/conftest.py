import types

import pytest

from keras_cluster_mask.data.shards import format_of

# What the fixture `shard` holds.
ROWS = [
    {"key": "k0", "image": "0.png", "caption": 'He said: "Hi, you\nthere"'},
    {"key": "k1", "image": "1.png", "caption": "zwei\tÄpfel"},
    {"key": "k2", "image": "2.png", "caption": "three"},
]


def read_all_of(path):
    """Reads all samples of a shard as an index does; returns them and their faults.

    Also checks that `scan`, which finds a sample, and `parse`, which reads it, agree.
    """
    path = str(path)
    format = format_of(path)
    context = format.context(path)
    entries = list(format.scan(path))
    stored = b"".join(entry.content for entry in entries)
    part = types.SimpleNamespace(
        shard=path, content=lambda place: stored[place[0] : sum(place)]
    )
    # In any order.
    contents = format.read([(part, entry.place) for entry in entries[::-1]])[::-1]
    samples, faults = [], []
    for number, (entry, content) in enumerate(zip(entries, contents)):
        if entry.fault:
            faults.append((entry.key, entry.fault))
            continue
        key, fields = format.parse(content, number, context)
        assert key == entry.key
        assert {*fields} <= {*entry.fields}
        samples.append((key, fields))
    return samples, faults


@pytest.fixture
def read_all():
    return read_all_of


@pytest.fixture
def scan():
    """Yields the keys of a shard, until its damage is raised."""

    def scan(path):
        for entry in format_of(str(path)).scan(str(path)):
            yield entry.key

    return scan


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
