import collections
import csv
import http.server
import io
import json
import random
import re
import threading

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
        errors: list of the errors that the next requests raise.
        failures: float. The share of the other requests that fail. Whether one fails
            depends on its bytes and on how often they were asked for, and not on the
            order of threads.
        failed: int. The number of requests that failed.
    """

    protocol = "storage"
    failures, failed = 0.0, 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("storage://"))

    def unstrip_protocol(self, name):
        return f"storage://{self._strip_protocol(name)}"

    def cat_file(self, path, start=None, end=None, **options):
        if self.errors:
            raise self.errors.pop()
        bytes_of = f"{path.rsplit('/', 1)[-1]} {start} {end}"
        self._asked[bytes_of] += 1
        draw = random.Random(f"{bytes_of} {self._asked[bytes_of]}").random()
        if draw < self.failures:
            type(self).failed += 1
            raise OSError("the connection was reset")
        content = super().cat_file(path, start, end, **options)
        self.requests.append((path, start or 0, (start or 0) + len(content)))
        return content


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """The class of a file system at `storage://`, which counts what is read."""
    # The index of files at an address is in a cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state = {"requests": [], "errors": [], "_asked": collections.Counter()}
    storage = type("Storage", (Storage,), state)
    fsspec.register_implementation("storage", storage, clobber=True)
    return storage


@pytest.fixture
def memory():
    """A file system in memory, which is empty before and after a test."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def server(tmp_path):
    """A web server of `tmp_path`, which sends parts of files.

    `sent` is the number of bytes for each request. The next requests get one of the
    `faults` each: they get half of their bytes, and wait for the others ("stall"), or
    get half as if it were the whole ("cut").
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = (tmp_path / self.path[1:]).read_bytes()
            wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = map(int, wanted.groups()) if wanted else (0, len(content) - 1)
            part = content[first : last + 1]
            if not part:
                server.sent.append(0)
                return self.send_error(416)
            is_get = self.command == "GET"
            fault = server.faults.pop() if is_get and server.faults else None
            half = part[: len(part) // 2]
            if fault == "cut":
                part = half
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", len(part))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            if is_get:
                server.sent.append(len(part))
                if fault == "stall":
                    self.wfile.write(half)
                    released.wait()
                self.wfile.write(part)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    released = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.sent, server.faults = [], []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        released.set()
        server.shutdown()
