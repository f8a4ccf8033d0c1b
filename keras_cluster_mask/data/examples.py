"""The captioned images that come with the repository, for guides and first trials."""

import os
import pathlib

# SHA-256 of each file of the repository's folder `datasets` that is downloaded.
FILES = {
    "images/test-00000.tar": (
        "e824990a81a0b190714484c7ea7b7de2aa79875014f5d8f36a547763803e85ea"
    ),
    "images/train-00000.tar": (
        "c0120f7720446d848db991cd1202838c3f16786284d53c4e0b70c3028956e6ae"
    ),
    "images/train-00001.tar": (
        "9139a973974a8f53b397f89454e242c5e795aee958bc85ff6edf9ca4475c2937"
    ),
    "images/train-00002.tar": (
        "7d683f9114a2bf63b9a5e3bd6a41123525390ae796fcfe4930676a83db95abab"
    ),
    "images/train-00003.tar": (
        "bd3e1328dda9697605dc8fa43a1dc8464c16d110741c3c036473cf3c85859c12"
    ),
    "images/validation-00000.tar": (
        "4cedaba4f0cbdb16c17c27898804d3b3d5d90f91d395205a0fbd29cccfe43ab5"
    ),
    "photographs/astronaut.jpg": (
        "770fd87882d352145ca60186876386b62702e893070bdf3539bb81b0f0998ba1"
    ),
    "photographs/chelsea.jpg": (
        "33d6c788cd0b867812296031717af5ccfb809ed8d1892425063f8a4e32588ab6"
    ),
    "photographs/coffee.jpg": (
        "54f0f04ce9c3736020684139e920ad68ed393a877cc8b41e0e99170ad33b9335"
    ),
    "photographs/hubble_deep_field.jpg": (
        "18c4b4dbc052cc8ca27b2ddc91e3b002ca66a29d48a535fbd73b228a474ad87d"
    ),
    "photographs/retina.jpg": (
        "2f99f5af1e1d050b697c3cdc3ba216307c92d49eef12f2feb32bedc6c773e783"
    ),
    "photographs/rocket.jpg": (
        "c8113cac952d40d7901267aaf74c945c06cf46feffacbdae92818be23460b3ff"
    ),
}
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
VARIABLE = "KCM_DATA_ORIGIN"


def example_images(origin: str | None = None) -> pathlib.Path:
    """Gives the folder of the captioned images that the guides train on.

    4,002 emoji and drawings of 64 pixels with a short caption each, in WebDataset
    shards: `train-*.tar` (3,223 images), `validation-*.tar` (433) and `test-*.tar`
    (346). Six photographs of 224 pixels lie in the folder `photographs` beside it.

    In a clone of the repository, this is the folder of the clone. Elsewhere, pass
    `origin` or set `KCM_DATA_ORIGIN`: the files (12 MB) are downloaded once to
    `~/.keras/datasets/keras_cluster_mask` and verified by their SHA-256 hashes. Call
    this function once before you start several processes, so that only one downloads.

    Example:

    ```python
    folder = kcm.data.example_images()
    captions = kcm.data.read_captions(folder / "test-*.tar")
    print(len(captions), captions[0])
    ```

    Args:
        origin: String. The URL of a copy of the repository's folder `datasets`,
            such as `"https://example.org/datasets"`. It is used even in a clone.
            `None`: the files of the clone; outside of one, the URL in the
            environment variable `KCM_DATA_ORIGIN`.

    Returns:
        A `pathlib.Path`, the folder `images`.

    Raises:
        FileNotFoundError: Outside of a clone, if no URL is given.
        OSError: If a file cannot be downloaded.
        ValueError: If a file differs from the one in the repository, or if `origin` is
            not a URL.
    """
    datasets = REPOSITORY / "datasets"
    if origin is None and all((datasets / name).exists() for name in FILES):
        return datasets / "images"
    name = VARIABLE if origin is None else "origin"
    address = os.environ.get(VARIABLE) or None if origin is None else origin
    if address is None:
        raise FileNotFoundError(
            "`origin` must be the URL of a copy of the repository's folder `datasets`, "
            "as there is none beside the package: pass it, set the environment "
            f"variable {VARIABLE}, or install from a clone, `pip install -e .`. "
            f"Received: origin={origin!r}"
        )
    if not isinstance(address, str) or "://" not in address:
        raise ValueError(
            f"`{name}` must be a URL such as 'https://example.org/datasets'. "
            f"Received: {name}={address!r}"
        )
    paths = [_download(name, address, *file) for file in FILES.items()]
    return paths[0].parent


def _download(argument, address, name, sha256):
    """The path of a file of the folder `datasets`, downloaded unless it is there."""
    # Imported here, as worker processes that read data do without Keras.
    import keras

    folder, file_name = name.split("/")
    url = f"{address.rstrip('/')}/{name}"
    try:
        path = keras.utils.get_file(
            file_name,
            origin=url,
            file_hash=sha256,
            hash_algorithm="sha256",
            cache_subdir=f"datasets/keras_cluster_mask/{folder}",
        )
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must be the URL of the repository's folder `datasets`, but "
            f"{name} differs from the original. Received: {argument}={address!r}"
        ) from error
    except Exception as error:
        # Keras raises no more specific exception for a failed download.
        raise OSError(
            f"`{argument}` must be a URL that can be downloaded from: {error}. "
            f"Received: {argument}={address!r}"
        ) from error
    return pathlib.Path(path)
