"""Pictures in rows and columns with text below them, as one picture."""

import dataclasses
import functools
import pathlib

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from keras_cluster_mask.data.backgrounds import composite
from keras_cluster_mask.data.pictures import Picture, UnreadablePicture

# All in pixels.
SIDE = 176
GAP = 12
TEXT, LINE = 13, 17
LABEL = 11
# Words in the place of a picture: how far from its edge, and how many lines.
INSET, MAX_WORDS = 8, 9
PAPER, FRAME, BLACK, GREY = "white", (238, 238, 238), "black", (110, 110, 110)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A picture of a sheet.

    Attributes:
        content: bytes. The encoded picture; or a `PIL.Image.Image`, as `fitted` returns
            it; or str, what to say in its place.
        caption: str.
        label: str. A line in small print above the caption; empty for none.
    """

    content: bytes | Image.Image | str
    caption: str
    label: str = ""


def draw_sheet(rows, max_lines=3):
    """Draws pictures in rows, with captions below them.

    Args:
        rows: list of lists of `Cell`, or `None` for places that stay empty.
        max_lines: int. How many lines of a caption are shown.

    Returns:
        A `PIL.Image.Image`.
    """
    texts = [
        [_wrap(cell.caption, max_lines) if cell else [] for cell in row] for row in rows
    ]
    labels = any(cell and cell.label for row in rows for cell in row) * LINE
    heights = [
        SIDE + 4 + labels + LINE * max(map(len, row), default=0) for row in texts
    ]
    columns = max(map(len, rows), default=0)
    size = GAP + columns * (SIDE + GAP), GAP + sum(heights) + GAP * len(rows)
    sheet = Image.new("RGB", size, PAPER)
    top = GAP
    for row, lines, height in zip(rows, texts, heights):
        for column, cell in enumerate(row):
            place = GAP + column * (SIDE + GAP), top
            if cell is not None:
                _draw_cell(sheet, place, cell, lines[column], labels)
        top += height + GAP
    return sheet


def _draw_cell(sheet, place, cell, lines, labels):
    left, top = place
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), FRAME)
    try:
        content = cell.content
        content = fitted(content) if isinstance(content, bytes) else content
    except UnreadablePicture as error:
        content = str(error)
    if isinstance(content, str):
        _draw_words(draw, place, content)
    else:
        width, height = content.size
        corner = left + (SIDE - width) // 2, top + (SIDE - height) // 2
        sheet.paste(content, corner)
    top += SIDE + 4
    if cell.label:
        draw.text((left, top), _cut(cell.label, _font(LABEL)), GREY, _font(LABEL))
    for number, line in enumerate(lines):
        draw.text((left, top + labels + number * LINE), line, BLACK, _font(TEXT))


def _draw_words(draw, place, words):
    lines = _wrap(words, MAX_WORDS, SIDE - 2 * INSET)
    top = place[1] + (SIDE - LINE * len(lines)) // 2
    for number, line in enumerate(lines):
        draw.text((place[0] + INSET, top + number * LINE), line, GREY, _font(TEXT))


def fitted(content):
    """A picture in the size that it has on a sheet.

    Args:
        content: bytes. The encoded picture.

    Returns:
        A `PIL.Image.Image`.

    Raises:
        UnreadablePicture: If it does not decode.
    """
    picture = Picture(content)
    scale = SIDE / max(picture.size)
    size = tuple(max(round(side * scale), 1) for side in picture.size)
    array = picture.whole(size)
    return Image.fromarray(composite(array) if array.shape[2] == 4 else array)


def _wrap(text, max_lines, width=SIDE):
    """Text in lines that are no wider; the last ends in dots if more follows."""
    lines, font = [""], _font(TEXT)
    for word in _words(text, font, width):
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1] = _cut(lines[-1] + " …", font, width)
    return lines


def _words(text, font, width):
    """Words, in pieces where they are longer than a line."""
    text = "".join(char if char.isprintable() else " " for char in text)
    for word in text.split():
        while font.getlength(word) > width:
            fits = 1
            while font.getlength(word[: fits + 1]) <= width:
                fits += 1
            yield word[:fits]
            word = word[fits:]
        yield word


def _cut(text, font, width=SIDE):
    """Text that is cut to a width."""
    text = "".join(char if char.isprintable() else " " for char in text)
    if font.getlength(text) <= width:
        return text
    text = text.removesuffix("…").rstrip()
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@functools.lru_cache
def _font(size):
    # matplotlib brings a font of many alphabets.
    path = pathlib.Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)
