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
PAPER, FRAME, BLACK, GREY = "white", (238, 238, 238), "black", (110, 110, 110)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A picture of a sheet.

    Attributes:
        content: bytes. The encoded picture; or str, what to say in its place.
        caption: str.
        label: str. A line in small print above the caption; empty for none.
    """

    content: bytes | str
    caption: str
    label: str = ""


def draw_sheet(rows, max_lines=3):
    """Draws pictures in rows, with captions below them.

    Args:
        rows: list of lists of `Cell`.
        max_lines: int. How many lines of a caption are shown.

    Returns:
        A `PIL.Image.Image`.
    """
    texts = [[_wrap(cell.caption, max_lines) for cell in row] for row in rows]
    labels = any(cell.label for row in rows for cell in row) * LINE
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
            _draw_cell(sheet, place, cell, lines[column], labels)
        top += height + GAP
    return sheet


def _draw_cell(sheet, place, cell, lines, labels):
    left, top = place
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), FRAME)
    try:
        picture = None if isinstance(cell.content, str) else _fitted(cell.content)
        reason = cell.content
    except UnreadablePicture as error:
        picture, reason = None, str(error)
    if picture is None:
        for number, line in enumerate(_wrap(reason, 4)):
            at = left + 8, top + SIDE // 3 + number * LINE
            draw.text(at, line, GREY, _font(TEXT))
    else:
        width, height = picture.size
        corner = left + (SIDE - width) // 2, top + (SIDE - height) // 2
        sheet.paste(picture, corner)
    top += SIDE + 4
    if cell.label:
        draw.text((left, top), _cut(cell.label, _font(LABEL)), GREY, _font(LABEL))
    for number, line in enumerate(lines):
        draw.text((left, top + labels + number * LINE), line, BLACK, _font(TEXT))


def _fitted(content):
    picture = Picture(content)
    scale = SIDE / max(picture.size)
    size = tuple(max(round(side * scale), 1) for side in picture.size)
    array = picture.whole(size)
    return Image.fromarray(composite(array) if array.shape[2] == 4 else array)


def _wrap(text, max_lines):
    """Text in lines that fit below a picture; the last ends in dots if more follows."""
    lines, font = [""], _font(TEXT)
    for word in _words(text, font):
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= SIDE:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1] = _cut(lines[-1] + " …", font)
    return lines


def _words(text, font):
    """Words, in pieces where they are longer than a line."""
    text = "".join(char if char.isprintable() else " " for char in text)
    for word in text.split():
        while font.getlength(word) > SIDE:
            fits = 1
            while font.getlength(word[: fits + 1]) <= SIDE:
                fits += 1
            yield word[:fits]
            word = word[fits:]
        yield word


def _cut(text, font):
    """Text that is cut to the width of a picture."""
    text = "".join(char if char.isprintable() else " " for char in text)
    if font.getlength(text) <= SIDE:
        return text
    text = text.removesuffix("…").rstrip()
    while text and font.getlength(text + "…") > SIDE:
        text = text[:-1]
    return text + "…"


@functools.lru_cache
def _font(size):
    # matplotlib brings a font of many alphabets.
    path = pathlib.Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)
