"""Manifests: tables (CSV, TSV, JSON lines) with one row per sample."""

import contextlib
import csv
import dataclasses
import itertools
import json

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import (
    FAULT,
    Entry,
    Shard,
    ShardError,
    state_of,
)

NAMES = ("metadata", "manifest")
ENDINGS = ("csv", "tsv", "jsonl")
# The number of rows in a shard: few enough to be shuffled well.
ROWS = 1024


@dataclasses.dataclass(frozen=True)
class ManifestPart(Shard):
    """Some rows of a manifest, whose columns are the fields.

    The names of image files are relative to the folder of the manifest, unless they are
    absolute paths or addresses. The key of a sample is the value of its first column.

    Attributes:
        first: int. The number of the first row, from 0.
        start: int. The offset of the first row in the file, in bytes.
        rows: int. The number of rows; None for all rows to the end.
    """

    first: int
    start: int
    rows: int | None = ROWS

    # A table may have one row for each caption of an image.
    unique_keys = False

    def read(self, fields=None):
        with files.open_file(self.path) as file:
            columns = self._columns(file)
            file.seek(self.start)
            rows = itertools.islice(_rows(self.path, file, columns), self.rows)
            for number, (_, _, row) in enumerate(rows, self.first):
                yield _sample(row, number, fields)

    def scan(self):
        with files.open_file(self.path) as file:
            rows = _rows(self.path, file, self._columns(file))
            for number, (start, size, row) in enumerate(rows):
                sample = _sample(row, number, None)
                fault = sample.pop(FAULT, None)
                key = sample.pop("__key__")
                fields = {name: state_of(value) for name, value in sample.items()}
                yield Entry(key, start, size, fields, fault)

    def context(self):
        with files.open_file(self.path) as file:
            return self._columns(file)

    def sample_at(self, content, number, context, fields=None):
        if context is None:
            return _sample(_json_row(content), number, fields)
        text = content.decode("utf-8", "replace")
        (cells,) = csv.reader([text], delimiter=_delimiter(self.path), strict=True)
        return _sample(_table_row(context, cells), number, fields)

    def _columns(self, file):
        try:
            return _columns(self.path, file)
        except (ValueError, csv.Error) as error:
            raise ShardError(self, {}, str(error)) from error

    def path_of(self, name):
        return files.beside(self.path, name)

    def __str__(self):
        return f"{self.path} from row {self.first}"


def find_manifest(folder):
    """The manifest of a folder, or None."""
    for name in NAMES:
        for ending in ENDINGS:
            path = f"{folder.rstrip('/')}/{name}.{ending}"
            if files.exists(path):
                return path
    return None


def manifest_parts(path):
    """The parts of a manifest, found in one pass over the file."""
    parts = []
    with contextlib.suppress(ValueError, csv.Error), files.open_file(path) as file:
        columns = _columns(path, file)
        parts.append(ManifestPart(path, 0, file.tell()))
        for number, (start, _, _) in enumerate(_rows(path, file, columns)):
            if number and number % ROWS == 0:
                parts.append(ManifestPart(path, number, start))
    # The last part reads to the end, or raises an error where it cannot.
    last = parts.pop() if parts else ManifestPart(path, 0, 0)
    return [*parts, dataclasses.replace(last, rows=None)]


def whole_manifest(path):
    """A manifest as one part."""
    return ManifestPart(path, 0, 0, None)


def _columns(path, file):
    """The names in the first line of a table; None for JSON lines."""
    if _is_json(path):
        return None
    line = file.readline().decode("utf-8-sig")
    columns = next(csv.reader([line], delimiter=_delimiter(path), strict=True), [])
    return [name.strip() for name in columns]


def _rows(path, file, columns):
    """Each row from the current position: its offset, its size, and a dict."""
    place = file.tell()
    if columns is None:
        for line in file:
            if line.strip():
                yield place, len(line), _json_row(line)
            place += len(line)
        return
    consumed, is_utf_8 = 0, True

    def lines():
        nonlocal consumed, is_utf_8
        for line in file:
            consumed += len(line)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                is_utf_8 = False
                yield line.decode("utf-8", "replace")

    while True:
        try:
            for cells in csv.reader(lines(), delimiter=_delimiter(path), strict=True):
                if cells:
                    row = _table_row(columns, cells)
                    fault = {} if is_utf_8 else {FAULT: "a row that is not UTF-8"}
                    yield place, consumed, {**row, **fault}
                place, consumed, is_utf_8 = place + consumed, 0, True
            return
        except csv.Error:
            # A quote without its end takes in the next rows, which may be intact.
            file.seek(place)
            line = file.readline()
            yield place, len(line), {FAULT: "a row with a quote that does not fit"}
            place, consumed, is_utf_8 = place + len(line), 0, True


def _json_row(line):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else {FAULT: "a line that is not a JSON object"}


def _table_row(columns, cells):
    # A comma in a caption without quotes would truncate the caption.
    if any(cells[len(columns) :]):
        return {**dict(zip(columns[:1], cells)), FAULT: "more cells than columns"}
    return dict(zip(columns, cells))


def _sample(row, number, fields):
    return {**_wanted(row, fields), "__key__": _key(row, number)}


def _key(row, number):
    """The value of the first column, as valid UTF-8."""
    key = next((str(value) for name, value in row.items() if name != FAULT), None)
    return f"row {number}" if key is None else key.encode("utf-8", "replace").decode()


def _wanted(row, fields):
    return {
        name: value
        for name, value in row.items()
        if value is not None and (fields is None or name in fields or name == FAULT)
    }


def _is_json(path):
    return path.lower().endswith((".jsonl", ".ndjson"))


def _delimiter(path):
    return "\t" if path.lower().endswith(".tsv") else ","
