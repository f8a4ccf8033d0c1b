import csv
import io
import json
import random

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem


@pytest.fixture
def noise(encode):
    """Encodes a random image; different seeds give different images."""

    def noise(seed, size=(20, 24), format="PNG"):
        generator = np.random.default_rng(seed)
        return encode(generator.integers(0, 256, (*size, 3), "uint8"), format)

    return noise


@pytest.fixture
def write_rows(tmp_path):
    """Writes a table, CSV, TSV, JSON lines or Parquet, of dicts; returns its path."""

    def write_rows(name, rows):
        path, file = tmp_path / name, io.StringIO(newline="")
        if path.suffix == ".parquet":
            pa, pq = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
            return path
        if path.suffix == ".jsonl":
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
        else:
            delimiter = "," if path.suffix == ".csv" else "\t"
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        path.write_bytes(file.getvalue().encode())
        return path

    return write_rows


class Storage(LocalFileSystem):
    """Local files as in an object store, `storage:///folder/file`.

    Attributes:
        requests: list of the path, the first byte and the byte after the last of each
            part of a file that was read.
        failures: float. The share of requests that fail.
        failed: int. The number of requests that failed.
    """

    protocol = "storage"
    requests, failures, failed = [], 0.0, 0
    _draws = random.Random(0)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("storage://"))

    def unstrip_protocol(self, name):
        return f"storage://{self._strip_protocol(name)}"

    def cat_file(self, path, start=None, end=None, **options):
        if self._draws.random() < self.failures:
            Storage.failed += 1
            raise OSError("the connection was reset")
        content = super().cat_file(path, start, end, **options)
        self.requests.append((path, start or 0, (start or 0) + len(content)))
        return content


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """The class of a file system at `storage://`, which counts what is read."""
    # The index of files at an address is in a cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Storage, "requests", [])
    monkeypatch.setattr(Storage, "failures", 0.0)
    monkeypatch.setattr(Storage, "failed", 0)
    monkeypatch.setattr(Storage, "_draws", random.Random(0))
    fsspec.register_implementation("storage", Storage, clobber=True)
    return Storage


@pytest.fixture
def memory():
    """A file system in memory, which is empty before and after a test."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]
