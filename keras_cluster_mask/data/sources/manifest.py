"""Manifests: tables (CSV, TSV, JSON lines) with a row a sample, beside the pictures."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import FAULT, Shard, ShardError

NAMES = ("metadata", "manifest")
ENDINGS = ("csv", "tsv", "jsonl")
# So many rows are a shard: few enough to be shuffled well, many enough to open a file.
ROWS = 1024


@dataclasses.dataclass(frozen=True)
class ManifestPart(Shard):
    """Some rows of a manifest; columns are the fields, the pictures are named by one.

    Names of files are meant from the manifest's folder, unless they are whole paths or
    addresses. The key of a sample is what its first column says.

    Attributes:
        first: int. The number of the first row, from 0.
        start: int. Where it starts in the file, in bytes.
        rows: int. How many rows; None for all up to the end.
    """

    first: int
    start: int
    rows: int | None = ROWS

    # A row for each of several captions of a picture is usual.
    unique_keys = False

    def read(self, fields=None):
        last = {}
        with files.open_file(self.path) as file:
            try:
                columns = _columns(self.path, file)
                file.seek(self.start)
                rows = itertools.islice(_rows(self.path, file, columns), self.rows)
                for number, (_, row) in enumerate(rows, self.first):
                    last = {"__key__": _key(row, number)}
                    yield {**_wanted(row, fields), **last}
            # A cell may hold a newline: nobody can tell where the next row starts.
            except (ValueError, csv.Error) as error:
                raise ShardError(self, last, str(error)) from error

    def path_of(self, name):
        return files.beside(self.path, name)

    def __str__(self):
        return f"{self.path} from row {self.first}"


class ManifestWriter:
    """Writes the rows of a manifest: a row a caption, in JSON lines a row a picture.

    Args:
        file: A binary file, open for writing.
        path: str. A name that ends in `.csv`, `.tsv` or `.jsonl`.
        header: bool. Whether to start with the names of the columns.
    """

    def __init__(self, file, path, header=True):
        self._file = file
        self._path = path
        if header and not _is_json(path):
            self._row("key", "file_name", "caption")

    def write(self, key, fields):
        """Writes a sample.

        Args:
            key: str.
            fields: dict of `"file_name"`, str, and `"captions"`, a list of str.
        """
        if _is_json(self._path):
            row = json.dumps({"key": key, **fields}, ensure_ascii=False)
            self._line(row + "\n")
            return
        for caption in fields["captions"]:
            self._row(key, fields["file_name"], caption)

    def close(self):
        """Does nothing: all is in the file, which stays open."""

    def _row(self, *cells):
        line = io.StringIO()
        # The end of a line that makes the writer quote either of its two characters.
        csv.writer(
            line, delimiter=_delimiter(self._path), lineterminator="\r\n"
        ).writerow(cells)
        self._line(line.getvalue().removesuffix("\r\n") + "\n")

    def _line(self, text):
        self._file.write(text.encode("utf-8", "replace"))


def find_manifest(folder):
    """The manifest of a folder, or None."""
    for name in NAMES:
        for ending in ENDINGS:
            path = f"{folder.rstrip('/')}/{name}.{ending}"
            if files.exists(path):
                return path
    return None


def manifest_parts(path):
    """The parts of a manifest, found in one pass over it."""
    parts = []
    with contextlib.suppress(ValueError, csv.Error), files.open_file(path) as file:
        columns = _columns(path, file)
        parts.append(ManifestPart(path, 0, file.tell()))
        for number, (start, _) in enumerate(_rows(path, file, columns)):
            if number and number % ROWS == 0:
                parts.append(ManifestPart(path, number, start))
    # The last reads on to the end, or to what cannot be read, and says so.
    last = parts.pop() if parts else ManifestPart(path, 0, 0)
    return [*parts, dataclasses.replace(last, rows=None)]


def _columns(path, file):
    """The names in the first line of a table; None where each line has its own."""
    if _is_json(path):
        return None
    line = file.readline().decode("utf-8-sig")
    columns = next(csv.reader([line], delimiter=_delimiter(path), strict=True), [])
    return [name.strip() for name in columns]


def _rows(path, file, columns):
    """Pairs of where a row starts and the row, a dict, from where the file is."""
    place = file.tell()
    if columns is None:
        for line in file:
            start, place = place, place + len(line)
            if line.strip():
                yield start, _json_row(line)
        return
    consumed = 0

    def lines():
        nonlocal consumed
        for line in file:
            consumed += len(line)
            yield line.decode("utf-8")

    for cells in csv.reader(lines(), delimiter=_delimiter(path), strict=True):
        start, place, consumed = place, place + consumed, 0
        if cells:
            yield start, _table_row(columns, cells)


def _json_row(line):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else {FAULT: "a line that is no JSON object"}


def _table_row(columns, cells):
    # A comma in a caption without quotes: the caption would be cut off there.
    if any(cells[len(columns) :]):
        return {**dict(zip(columns[:1], cells)), FAULT: "more cells than columns"}
    return dict(zip(columns, cells))


def _key(row, number):
    """What the first column says, as what can be written in UTF-8."""
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
