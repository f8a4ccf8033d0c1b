"""Tables (CSV, TSV, JSON lines) with a row for each image or caption."""

import contextlib
import csv
import functools
import itertools

from keras_cluster_mask.data import files
from keras_cluster_mask.data.samples import (
    UTF_16,
    DamagedShard,
    Entry,
    Format,
    filled,
    json_object,
)

# The file names of the table of a folder.
NAMES, ENDINGS = ("metadata", "manifest", "captions"), ("csv", "tsv", "jsonl")
TABLES = [f"{name}.{end}" for name in NAMES for end in ENDINGS]
# The maximum size of a row in bytes.
MAX_ROW = 2**20
NO_CSV = "a row that is not CSV in UTF-8"
NO_JSON = "a line that is not a JSON object"


class Table(Format):
    """Tables, with columns as fields.

    The names of image files are relative to the folder of the table, unless they are
    absolute paths or URLs. The rows of one image are a sample with several captions.
    Its key is the value of the first column in its first row. A broken row affects no
    other row.

    Quotes follow CSV, but many TSV files have none: there, a cell that is not quoted as
    in CSV keeps its quotes, and a line that has all cells is a row.

    Args:
        delimiter: String. The delimiter of cells; None for JSON lines.
    """

    noun = "table"
    has_rows = True
    names_files = True

    def __init__(self, delimiter):
        self.delimiter = delimiter
        # Captions may be longer than the default limit of the csv module, which also
        # ends the search for a closing quote.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))

    def context(self, path):
        """Returns the names of the columns. JSON lines have none."""
        if self.delimiter is None:
            return None
        with files.open_file(path) as file:
            return self._columns(path, file)

    def explain(self, context):
        return context and (
            f"the first line was read as the names of columns, {context}: if it is a "
            "row, add a header line above it, for example `filepath` and `caption`"
        )

    def scan(self, path):
        with files.open_file(path) as file:
            columns, number = self._columns(path, file), 0
            for start, content in self._rows(file, columns):
                if content.strip():
                    (key, fields), fault = self._row(content, number, columns)
                    yield Entry(key, (start, len(content)), fields, fault)
                    number += 1

    def parse(self, content, number, context):
        return self._row(content, number, context)[0]

    def _columns(self, path, file):
        """Reads the column names of a table. JSON lines have None."""
        if file.peek(2).startswith(UTF_16):
            raise ValueError(
                "`source` must be in UTF-8: save the table again in this encoding. "
                f"Received: {path}, in UTF-16"
            )
        if self.delimiter is None:
            return None
        line = file.readline(MAX_ROW)
        row, fault = self._cells([line.removeprefix(b"\xef\xbb\xbf")])
        if fault:
            raise DamagedShard(path, None, f"its first line is {fault}", 0.0)
        return [name.strip() for name in row]

    def _rows(self, file, columns):
        """Yields the offset and the bytes of each row. A broken row is one line."""

        def is_row(line):
            return self.delimiter == "\t" and line.count(b"\t") + 1 >= len(columns)

        start, read_line = file.tell(), functools.partial(file.readline, MAX_ROW + 1)
        while row := read_line():
            # Only a quoted cell may contain a newline.
            if self.delimiter is not None and b'"' in row:
                more = iter(read_line, b"")
                if is_row(row):
                    more = itertools.takewhile(lambda line: not is_row(line), more)
                _, fault = self._cells(itertools.chain([row], more))
                size = len(row) if fault else file.tell() - start
                file.seek(start)
                row = file.read(size)
            yield start, row
            # Skip the rest of a line that is too long, without keeping it in memory.
            while row and not row.endswith(b"\n"):
                row = read_line()
            start = file.tell()

    def _cells(self, lines):
        """Returns the cells of one row and None, or an empty list and a fault."""
        texts = (line.decode() for line in lines)
        reader = csv.reader(texts, delimiter=self.delimiter, strict=True)
        try:
            return next(reader, []), None
        except (csv.Error, UnicodeDecodeError):
            return [], NO_CSV

    def _row(self, content, number, columns):
        """Returns the key and the fields of a row, and None or a fault."""
        row, fault = {}, None
        if len(content) > MAX_ROW:
            fault = "a row of more than a mebibyte"
        elif columns is None:
            row = json_object(content)
            row, fault = ({}, NO_JSON) if row is None else (row, None)
        else:
            cells, fault = self._cells([content])
            if fault and self.delimiter == "\t":
                with contextlib.suppress(UnicodeDecodeError):
                    cells, fault = content.decode().rstrip("\r\n").split("\t"), None
            # An unquoted comma in a caption would truncate the caption.
            if any(cells[len(columns) :]):
                cells, fault = cells[:1], "more cells than columns"
            row = dict(zip(columns, cells))
        # The value of the first column, as valid UTF-8.
        key = next(map(str, row.values()), f"row {number}")
        return (key.encode("utf-8", "replace").decode(), filled(row)), fault
