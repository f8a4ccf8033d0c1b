"""Writes tables and numbers of `results/` into Markdown pages.

    python benchmarks/tables.py            # into all pages of the repository
    python benchmarks/tables.py --check    # only shows what differs, and fails

A comment says what stands between it and the next `<!-- end -->`:

    <!-- table step_time-torch-batch32.json
    columns: method; step (ms) {,.0f} as milliseconds; / none {.2f}
    rows: none as whole images; random; cluster
    -->
    <!-- end -->

    A search takes <!-- value retrieval.json; good; seconds {.0f} -->71<!-- end --> s.

`{.2f}` formats a number, `as` renames. A row is named by an entry that no other row
has, or by several, `512 + whole`. Without `rows:` a table has all rows. Several files,
`A.json as torch; B.json as JAX`, are joined by `rows:` or by the first column.
`FILE.json#KEY` reads the rows of another key of the file.
"""

import decimal
import difflib
import json
import re
import sys
from pathlib import Path

from reporting import parser, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- (table|value) (.*?)\s*-->).*?<!-- end -->", re.DOTALL)
OPENING = re.compile(r"<!-- (?:table|value) ")
# Markdown takes these lines for HTML, and does not format the rest of them.
MISPLACED = re.compile(r"^[ >]*(?:(?:[-*+]|\d+\.) +)?<!-- value .*$", re.MULTILINE)
ITEM = re.compile(r"(.+?)(?: \{(.*?)\})?(?: as (.+))?")
NUMBER = re.compile(r"([-+]?[\d,.]+(?:e[-+]?\d+)?)( ?%)?")


def main():
    parsed = parser(__doc__)
    parsed.add_argument("pages", nargs="*", type=Path, help="Markdown files, or all")
    parsed.add_argument("--check", action="store_true", help="only show what differs")
    options = parsed.parse_args()
    differences = [rewrite(page, options.check) for page in options.pages or pages()]
    sys.stdout.write("".join(differences))
    if options.check and any(differences):
        sys.exit("Pages differ from benchmarks/results: run benchmarks/tables.py.")


def pages():
    """The Markdown files of the repository."""
    folders = ("docs", "benchmarks", "guides", "examples", "datasets")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*.md")]
    return sorted([*ROOT.glob("*.md"), *inside])


def rewrite(page, check=False):
    """Rewrites a page, unless only to check it; returns the differences."""
    old = page.read_text(encoding="utf-8")
    try:
        new = rendered(old)
    except ValueError as error:
        error.add_note(f"This is in {page}.")
        raise
    if new != old and not check:
        page.write_text(new, encoding="utf-8")
    lines = [text.splitlines(keepends=True) for text in (old, new)]
    return "".join(difflib.unified_diff(*lines, str(page), str(page)))


def rendered(text):
    """The text with each table and number as the results have it."""
    opened, ended = len(OPENING.findall(text)), text.count("<!-- end -->")
    if not opened == ended == len(MARK.findall(text)):
        raise ValueError(
            "Each table and value must have an `<!-- end -->` before the next. "
            f"Received: {opened} of them, {ended} ends"
        )
    if misplaced := MISPLACED.search(text):
        raise ValueError(
            "A value must not begin a line: wrap the text elsewhere. "
            f"Received: {misplaced[0]!r}"
        )

    def filled(mark):
        opening, kind, content = mark.groups()
        inside = value(content) if kind == "value" else f"\n\n{joined(content)}\n\n"
        return f"{opening}{inside}<!-- end -->"

    return MARK.sub(filled, text)


def value(content):
    """The number that `FILE; ROW; COLUMN` names."""
    if content.count(";") != 2:
        raise ValueError(f"A value needs `FILE; ROW; COLUMN`. Received: {content!r}")
    place, _, column = content.rpartition(";")
    (file, *_), (name, *_) = items(place)
    ((column, form, _),) = items(column, formats=True)
    results = Results(file)
    return results.entry(row_of_each([results], name)[0], column, form)


def joined(content):
    """The table of a line of files, one of `columns:` and perhaps one of `rows:`."""
    files, *options = re.split(r" (columns|rows): ", " ".join(content.split()))
    if options[::2] not in (["columns"], ["columns", "rows"]):
        raise ValueError(
            "A table needs its files, a line `columns: ...` and perhaps a line "
            f"`rows: ...`. Received: {content!r}"
        )
    options = dict(zip(options[::2], options[1::2]))
    titles = [title for *_, title in items(files, titles=True)]
    files = [Results(file) for file, *_ in items(files, titles=True)]
    first, _, others = options["columns"].partition(";")
    ((key, _, heading),) = items(first, titles=True)
    columns = items(others, formats=True, titles=True)
    if "rows" in options:
        named = items(options["rows"], titles=True)
        chosen = [(title, row_of_each(files, name)) for name, _, title in named]
    elif len(files) == 1:
        chosen = [(files[0].entry(row, key), [row]) for row in files[0].rows]
    else:
        names = dict.fromkeys(
            file.entry(row, key) for file in files for row in file.rows
        )
        chosen = [(name, row_of_each(files, name, key)) for name in names]
    lines = []
    for title, rows in chosen:
        line = {heading: title}
        for file, of_file, row in zip(files, titles, rows):
            for column, form, header in columns:
                if len(files) > 1:
                    header = of_file if len(columns) == 1 else f"{of_file}: {header}"
                if header in line:
                    raise ValueError(
                        f"Columns of a table must differ in name. Received: {header!r}"
                    )
                line[header] = file.entry(row, column, form)
        lines.append(line)
    return table(lines)


class Results:
    """The rows of `FILE.json`, or those of `KEY` in `FILE.json#KEY`."""

    def __init__(self, reference):
        file, _, key = reference.partition("#")
        known = [path.relative_to(RESULTS) for path in sorted(RESULTS.rglob("*.json"))]
        require_known(file, map(str, known), "file of benchmarks/results")
        content = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        content |= content.get("tables", {})
        require_known(key or "rows", content, f"key of {file}")
        found = content[key or "rows"]
        self.reference = reference
        self.rows = found["rows"] if isinstance(found, dict) else found
        self.columns = dict.fromkeys(column for row in self.rows for column in row)

    def entry(self, row, column, form=None):
        """A row's entry in a column as text, empty if it has none."""
        require_known(column, self.columns, f"column of {self.reference}")
        # A line does not break within a mean and its deviation.
        text = str(row.get(column, "")).replace(" ± ", "&nbsp;±&nbsp;")
        if form is None or not text:
            return text
        if (number := NUMBER.fullmatch(text)) is None:
            raise ValueError(f"The format {form!r} needs a number. Received: {text!r}")
        exact = decimal.Decimal(number[1].replace(",", ""))
        with decimal.localcontext(rounding=decimal.ROUND_HALF_UP):
            return format(exact, form) + (number[2] or "")


def row_of_each(files, name, key=None):
    """The row of this name in each file, empty where there is none, but not in all."""
    found = []
    for file in files:
        columns = file.columns if key is None else [key]
        entries = [{file.entry(row, c) for c in columns} for row in file.rows]
        parts = set(name.split(" + "))
        rows = [row for row, has in zip(file.rows, entries) if parts <= has]
        if len(rows) > 1:
            raise ValueError(
                "A row must be named by entries that no other row has. "
                f"Received: {name!r}, of {len(rows)} rows of {file.reference}"
            )
        found.append(rows[0] if rows else {})
    if not any(found):
        known = [next(iter(row.values())) for file in files for row in file.rows]
        require_known(name, map(str, known), f"row of {files[0].reference}")
    return found


def items(text, formats=False, titles=False):
    """Name, format and title of each `NAME {FORMAT} as TITLE` in a list."""
    found = []
    for part in text.split(";"):
        item = ITEM.fullmatch(part.strip())
        if item is None or (item[2] and not formats) or (item[3] and not titles):
            raise ValueError(
                "Write columns as `NAME {FORMAT} as TITLE`; files, rows and the first "
                "column take no format, values take no title. "
                f"Received: {part.strip()!r}"
            )
        found.append((item[1], item[2], item[3] or item[1]))
    return found


def require_known(name, known, what):
    if name not in (known := list(dict.fromkeys(known))):
        known = "; ".join(known)
        raise ValueError(f"A {what} must be one of {known}. Received: {name!r}")


if __name__ == "__main__":
    main()
