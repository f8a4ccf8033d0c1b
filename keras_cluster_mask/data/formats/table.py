"""Tables (CSV, TSV, JSON lines) with a row for each image or caption."""

import contextlib
import csv
import functools
import itertools
import json
import os

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.indexed import DamagedFile, IndexedFiles, Row
from keras_cluster_mask.data.samples import BrokenSample, filled, merged

# The file names of the table of a folder.
NAMES, ENDINGS = ("metadata", "manifest", "captions"), ("csv", "tsv", "jsonl")
TABLES = [f"{name}.{end}" for name in NAMES for end in ENDINGS]
# Files with another ending are JSON lines.
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# The maximum size of a row in bytes.
MAX_ROW = 2**20
# Captions may be longer than the default limit of the csv module, which also ends the
# search for a closing quote.
csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))


class Table(IndexedFiles):
    """Tables, with columns as fields.

    The names of image files are relative to the folder of the table, unless they are
    absolute paths or URLs. The rows of one image are a sample with several captions.
    Its key is the value of the first column in its first row. A broken row affects no
    other row.

    Quotes follow CSV, but many TSV files have none: there, a cell that is not quoted as
    in CSV keeps its quotes, and a line that has all cells is a row.
    """

    def context(self, path):
        """Returns the delimiter and the names of the columns; `None` for JSON lines."""
        delimiter = DELIMITERS.get(os.path.splitext(path)[1].lower())
        if delimiter is None:
            return None
        with files.open_file(path) as file:
            line = file.readline(MAX_ROW).removeprefix(b"\xef\xbb\xbf")
        try:
            columns = _cells([line], delimiter)
        except BrokenSample as error:
            raise DamagedFile(path, None, f"its first line is {error}") from error
        return [delimiter, [name.strip() for name in columns]]

    def scan(self, path, context):
        with files.open_file(path) as file:
            if context is not None:
                file.readline(MAX_ROW)
            for start, content in _rows(file, context):
                if not content.strip():
                    continue
                fields = {}
                with contextlib.suppress(BrokenSample):
                    fields = filled(self.parse(content, 0, context)[1])
                image = next((fields[k] for k in self._image_keys if k in fields), None)
                yield Row((start, len(content)), content, image)

    def parse(self, content, number, context):
        if len(content) > MAX_ROW:
            raise BrokenSample("a row longer than 1 MiB")
        row = _object(content) if context is None else _row(content, *context)
        # The value of the first column, as valid UTF-8.
        key = next(map(str, row.values()), f"{number}")
        return key.encode("utf-8", "replace").decode(), row


def _rows(file, context):
    """Yields the offset and the bytes of each row. A broken row is one line."""
    delimiter, columns = context or (None, ())

    def is_row(line):
        return delimiter == "\t" and line.count(b"\t") + 1 >= len(columns)

    start, read_line = file.tell(), functools.partial(file.readline, MAX_ROW + 1)
    while row := read_line():
        # Only a quoted cell may contain a newline.
        if delimiter is not None and b'"' in row:
            more = iter(read_line, b"")
            if is_row(row):
                more = itertools.takewhile(lambda line: not is_row(line), more)
            size = len(row)
            with contextlib.suppress(BrokenSample):
                _cells(itertools.chain([row], more), delimiter)
                size = file.tell() - start
            file.seek(start)
            row = file.read(size)
        yield start, row
        # Skip the rest of a line that is too long, without keeping it in memory.
        while row and not row.endswith(b"\n"):
            row = read_line()
        start = file.tell()


def _row(content, delimiter, columns):
    """Returns the fields of a row of CSV or TSV."""
    try:
        cells = _cells([content], delimiter)
    except BrokenSample:
        if delimiter != "\t":
            raise
        cells = content.decode(errors="replace").rstrip("\r\n").split("\t")
    # An unquoted comma in a caption would truncate the caption.
    if any(cells[len(columns) :]):
        raise BrokenSample("more cells than columns")
    row = dict(zip(columns, cells))
    if len(row) < len(columns):
        # Such as several columns of captions.
        row = merged([{name: cell} for name, cell in zip(columns, cells)])
    return row


def _cells(lines, delimiter):
    """Returns the cells of one row."""
    texts = (line.decode() for line in lines)
    try:
        return next(csv.reader(texts, delimiter=delimiter, strict=True), [])
    except (csv.Error, UnicodeDecodeError):
        raise BrokenSample("a row that is not CSV in UTF-8") from None


def _object(content):
    """Returns the dictionary of a line of JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(content)
        if isinstance(row, dict):
            return row
    raise BrokenSample("a line that is not a JSON object")
