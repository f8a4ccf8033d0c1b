"""Draws the logo of the site: a grid of patches, one cluster of which is left out.

    python .ci/draw_logo.py

writes `docs/logo.svg`. Its colors show on light and dark pages.
"""

from pathlib import Path

# One character per patch: # is kept, o is left out, and A is the anchor of the cluster.
PATCHES = [
    "#oo#",
    "oAo#",
    "#o##",
    "####",
]
PAINTS = {
    "#": 'fill="#5c6bc0"',
    "o": 'fill="#5c6bc0" fill-opacity=".25"',
    "A": 'fill="#ff9800"',
}
STEP, GAP = 24, 3


def draw():
    side, patch = STEP * len(PATCHES), STEP - GAP
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">']
    for row, kinds in enumerate(PATCHES):
        for column, kind in enumerate(kinds):
            x, y = column * STEP + GAP / 2, row * STEP + GAP / 2
            size = f'width="{patch}" height="{patch}" rx="4"'
            lines.append(f'<rect x="{x}" y="{y}" {size} {PAINTS[kind]}/>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "logo.svg").write_text(draw())
