import fsspec
import pytest

from keras_cluster_mask.data.formats import format_of


@pytest.fixture
def read_all():
    """Reads all samples of a shard as an index does; returns them and their faults.

    Also checks that `scan`, which finds a sample, and `parse`, which reads it, agree.
    """

    def read_all(path):
        path = str(path)
        format = format_of(path)
        context = format.context(path)
        entries = list(format.scan(path))
        if format.in_index:
            contents = [entry.content for entry in entries]
        else:
            places = [(path, entry.offset, entry.size) for entry in entries]
            contents = format.read(places)
        samples, faults = [], []
        for number, (entry, content) in enumerate(zip(entries, contents)):
            if entry.fault:
                faults.append((entry.key, entry.fault))
                continue
            key, fields = format.parse(content, number, context)
            assert key == entry.key
            empty = ("", b"", None, [])
            assert {n for n in fields if fields[n] not in empty} <= {*entry.fields}
            samples.append((key, fields))
        return samples, faults

    return read_all


@pytest.fixture
def scan():
    """Yields the keys of a shard, until its damage is raised."""

    def scan(path):
        for entry in format_of(str(path)).scan(str(path)):
            yield entry.key

    return scan


@pytest.fixture
def memory():
    """A file system in memory, which is empty before and after a test."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]
