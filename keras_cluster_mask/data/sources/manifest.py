"""Manifests: tables (CSV, TSV, JSON lines) with a row a sample, beside the pictures."""

import csv
import dataclasses
import io
import itertools
import json
import os

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import Shard, ShardError

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
    """

    first: int
    start: int

    # A row for each of several captions of a picture is usual.
    unique_keys = False

    def read(self, fields=None):
        key = None
        with files.open_file(self.path) as file:
            columns = _columns(self.path, file)
            file.seek(self.start)
            rows = itertools.islice(_rows(self.path, file, columns), ROWS)
            while True:
                try:
                    _, row = next(rows, (None, None))
                except (ValueError, csv.Error) as error:
                    # A cell may hold a newline: nobody can tell where the next starts.
                    last = {} if key is None else {"__key__": key}
                    raise ShardError(self, last, str(error)) from error
                if row is None:
                    return
                key = str(next(iter(row.values()), ""))
                wanted = {k: v for k, v in row.items() if fields is None or k in fields}
                yield {**wanted, "__key__": key}

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
    """The manifest of a folder."""
    for name in NAMES:
        for ending in ENDINGS:
            path = f"{folder.rstrip('/')}/{name}.{ending}"
            if files.exists(path):
                return path
    raise FileNotFoundError(
        "`source` must name shards, for example "
        f"{os.path.join(folder, '*.tar')!r}, or a folder that holds metadata.csv, .tsv "
        f"or .jsonl with a row a picture. Received a folder without: {folder}"
    )


def manifest_parts(path):
    """The parts of a manifest, found in one pass over it."""
    parts = []
    try:
        with files.open_file(path) as file:
            columns = _columns(path, file)
            for number, (start, _) in enumerate(_rows(path, file, columns)):
                if number % ROWS == 0:
                    parts.append(ManifestPart(path, number, start))
    except (ValueError, csv.Error):
        # What can be read up to there is; reading it says what is wrong.
        pass
    return parts or [ManifestPart(path, 0, 0)]


def _columns(path, file):
    """The names in the first line of a table; None where each line has its own."""
    if _is_json(path):
        return None
    line = file.readline().decode("utf-8-sig")
    columns = next(csv.reader([line], delimiter=_delimiter(path)), [])
    return [name.strip() for name in columns]


def _rows(path, file, columns):
    """Pairs of where a row starts and the row, a dict, from where the file is."""
    place = file.tell()
    consumed = 0

    def lines():
        nonlocal consumed
        for line in file:
            consumed += len(line)
            yield line.decode("utf-8")

    if columns is None:
        for line in lines():
            start, place, consumed = place, place + consumed, 0
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a line is no JSON object: {line[:80]!r}")
                yield start, row
        return
    reader = csv.reader(lines(), delimiter=_delimiter(path), strict=True)
    for cells in reader:
        start, place, consumed = place, place + consumed, 0
        if cells:
            yield start, dict(zip(columns, cells))


def _is_json(path):
    return path.lower().endswith((".jsonl", ".ndjson"))


def _delimiter(path):
    return "\t" if path.lower().endswith(".tsv") else ","
