"""Files of results."""

import json

from keras_cluster_mask.data import files


def write_json(path, content):
    """Writes what JSON can hold, all or nothing.

    Args:
        path: str or path.
        content: dict.
    """
    with files.replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def write_figure(path, image):
    """Writes a picture as PNG, all or nothing.

    Args:
        path: str or path.
        image: `PIL.Image.Image`, or `matplotlib.figure.Figure`.
    """
    with files.replacing(path) as file:
        if hasattr(image, "savefig"):
            image.savefig(file, format="png", dpi=150)
        else:
            image.save(file, "PNG")
