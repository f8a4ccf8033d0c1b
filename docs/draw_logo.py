"""Draws the logo and the favicon of the site: a grid of patches, one cluster left out.

    python docs/draw_logo.py

writes `docs/logo.svg`, white for the colored header, and `docs/favicon.svg`.
"""

from pathlib import Path

# One character per patch: # is kept, o is left out, and A is the anchor of the cluster.
PATCHES = [
    "#oo#",
    "oAo#",
    "#o##",
    "####",
]
STEP, GAP = 24, 3


def draw(kept, anchor):
    """The grid as SVG, with the left-out patches pale."""
    paints = {
        "#": f'fill="{kept}"',
        "o": f'fill="{kept}" fill-opacity=".25"',
        "A": f'fill="{anchor}"',
    }
    side, patch = STEP * len(PATCHES), STEP - GAP
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">']
    for row, kinds in enumerate(PATCHES):
        for column, kind in enumerate(kinds):
            x, y = column * STEP + GAP / 2, row * STEP + GAP / 2
            size = f'width="{patch}" height="{patch}" rx="4"'
            lines.append(f'<rect x="{x}" y="{y}" {size} {paints[kind]}/>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "logo.svg").write_text(draw("#fff", "#ffb74d"))
    # A color that shows on the light and the dark tabs of browsers.
    (folder / "favicon.svg").write_text(draw("#5c6bc0", "#ff9800"))
