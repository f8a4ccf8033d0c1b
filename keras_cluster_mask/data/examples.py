"""Captioned example images in the repository, for guides and first experiments."""

import pathlib

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "datasets" / "images"


def example_images() -> pathlib.Path:
    """Returns the folder of the captioned images that the guides train on.

    It contains 4,002 emoji and drawings of 64 pixels, each with a short caption, in
    WebDataset shards: `train-*.tar` (3,223 images), `validation-*.tar` (433) and
    `test-*.tar` (346). The folder `photographs` next to it contains six photographs of
    224 pixels.

    The images are part of a clone of the repository, not of the installed package.

    Example:

    ```python
    folder = kcm.data.example_images()
    captions = kcm.data.read_captions(folder / "test-*.tar")
    print(len(captions), captions[0])
    ```

    Returns:
        A `pathlib.Path`, the folder `images`.

    Raises:
        FileNotFoundError: If the package is not used from a clone.
    """
    if not FOLDER.exists():
        raise FileNotFoundError(
            "`example_images` needs a clone of the repository: install the package "
            f"from one, `pip install -e .`. Received: no folder {FOLDER}"
        )
    return FOLDER
