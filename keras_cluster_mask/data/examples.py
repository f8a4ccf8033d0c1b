"""The captioned images that come with the repository, for guides and first trials."""

import pathlib

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "datasets" / "images"


def example_images() -> pathlib.Path:
    """Gives the folder of the captioned images that the guides train on.

    4,002 emoji and drawings of 64 pixels with a short caption each, in WebDataset
    shards: `train-*.tar` (3,223 images), `validation-*.tar` (433) and `test-*.tar`
    (346). Six photographs of 224 pixels lie in the folder `photographs` beside it.

    They are part of a clone of the repository, not of the installed package.

    Example:

    ```python
    folder = kcm.data.example_images()
    captions = kcm.data.read_captions(folder / "test-*.tar")
    print(len(captions), captions[0])
    ```

    Returns:
        A `pathlib.Path`, the folder `images`.

    Raises:
        FileNotFoundError: Outside of a clone.
    """
    if not FOLDER.exists():
        raise FileNotFoundError(
            "`example_images` needs a clone of the repository: install the package "
            f"from one, `pip install -e .`. Received: no folder {FOLDER}"
        )
    return FOLDER
