"""Tables (CSV, TSV, JSON lines) with a row for each image or caption."""

import contextlib
import csv
import itertools
import json

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.base import DamagedShard, Entry, Format, is_empty

# The file names of the table of a folder, in order of preference.
ENDINGS = "csv", "tsv", "jsonl"
TABLES = [f"{name}.{end}" for name in ("metadata", "manifest") for end in ENDINGS]
# The maximum size of a row in bytes. It limits the search for a closing quote.
MAX_ROW = 2**20
NO_CSV = "a row that is not CSV in UTF-8"
NO_JSON = "a line that is not a JSON object"


class Table(Format):
    """Tables, whose columns are the fields.

    The names of image files are relative to the folder of the table, unless they are
    absolute paths or URLs. The rows of one image are a sample with several captions.
    Its key is the value of the first column in its first row. A broken row affects no
    other row.

    Quotes are those of CSV, but many TSV files have none: there, a cell that is not
    quoted as in CSV keeps its quotes, and a line that has all cells is a row.

    Args:
        delimiter: str. The delimiter of cells; None for JSON lines.
    """

    has_rows = True
    names_files = True

    def __init__(self, delimiter):
        self.delimiter = delimiter
        # Captions may be longer than the default limit of the csv module.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))

    def scan(self, path):
        with files.open_file(path) as file:
            columns, first = self._columns(path, file)
            number = 0
            for start, content in self._rows(file, first, columns):
                if not content.strip():
                    continue
                row, fault = self._row(content, columns)
                fields = {k: v for k, v in row.items() if not is_empty(v)}
                yield Entry(_key(row, number), start, len(content), fields, fault)
                number += 1

    def context(self, path):
        with files.open_file(path) as file:
            return self._columns(path, file)[0]

    def parse(self, content, number, context):
        row, _ = self._row(content, context)
        return _key(row, number), {k: v for k, v in row.items() if v is not None}

    def _columns(self, path, file):
        """Returns the column names of a table, and the offset of its first row."""
        if self.delimiter is None:
            return None, 0
        line = file.readline(MAX_ROW)
        row, fault = self._cells([line.removeprefix(b"\xef\xbb\xbf")])
        if fault:
            raise DamagedShard(path, None, f"its first line is {fault}")
        return [name.strip() for name in row], len(line)

    def _rows(self, file, start, columns):
        """Yields the offset and the bytes of each row. A broken row is one line."""

        def is_row(line):
            return self.delimiter == "\t" and line.count(b"\t") + 1 >= len(columns)

        taken = []
        while True:
            file.seek(start)
            taken.clear()
            first = next(_lines(file, taken), None)
            if first is None:
                return
            # Only a quoted cell may contain a newline.
            if self.delimiter is not None and b'"' in first:
                more = _lines(file, taken)
                if is_row(first):
                    more = itertools.takewhile(lambda line: not is_row(line), more)
                _, fault = self._cells(itertools.chain([first], more))
                if fault:
                    del taken[1:]
            yield start, b"".join(taken)
            start += sum(map(len, taken))
            # Skip the rest of a line that is too long, without keeping it in memory.
            while not taken[-1].endswith(b"\n") and (more := file.readline(MAX_ROW)):
                taken[-1] = more
                start += len(more)

    def _cells(self, lines):
        """Returns the cells of one row and None, or an empty list and a fault."""
        texts = (line.decode() for line in lines)
        reader = csv.reader(texts, delimiter=self.delimiter, strict=True)
        try:
            return next(reader, []), None
        except (csv.Error, UnicodeDecodeError):
            return [], NO_CSV

    def _row(self, content, columns):
        """Returns a row as a dict and None, or an incomplete row and a fault."""
        if len(content) > MAX_ROW:
            return {}, "a row of more than a mebibyte"
        if columns is None:
            try:
                row = json.loads(content.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                row = None
            return (row, None) if isinstance(row, dict) else ({}, NO_JSON)
        cells, fault = self._cells([content])
        if fault and self.delimiter == "\t":
            with contextlib.suppress(UnicodeDecodeError):
                cells, fault = content.decode().rstrip("\r\n").split("\t"), None
        # An unquoted comma in a caption would truncate the caption.
        if any(cells[len(columns) :]):
            cells, fault = cells[:1], "more cells than columns"
        return dict(zip(columns, cells)), fault


def _lines(file, taken):
    """Yields lines up to the maximum size of a row, and appends them to `taken`."""
    size = sum(map(len, taken))
    while size < MAX_ROW and (line := file.readline(MAX_ROW + 1)):
        taken.append(line)
        size += len(line)
        yield line


def _key(row, number):
    """Returns the value of the first column, as valid UTF-8."""
    key = next(map(str, row.values()), f"row {number}")
    return key.encode("utf-8", "replace").decode()
