"""Finds the shards that a source names, and the format of each."""

import contextlib
import itertools
import os
import pathlib
import re
from collections.abc import Sequence

import braceexpand

from keras_cluster_mask.data import files
from keras_cluster_mask.data.files import Threads
from keras_cluster_mask.data.formats.folder import ENDINGS, Folder, images_in
from keras_cluster_mask.data.formats.parquet import Parquet
from keras_cluster_mask.data.formats.table import TABLES, Table
from keras_cluster_mask.data.formats.tar import Tar
from keras_cluster_mask.data.samples import hash_of

# The number of parallel requests for the size and date of files.
REQUESTS = 16
# Formats by file extension. Files with any other name are read as tar files.
FORMATS = {
    r"\.csv": Table(","),
    r"\.tsv": Table("\t"),
    r"\.(jsonl|ndjson)": Table(None),
    r"\.parquet": Parquet(),
    "|".join(map(re.escape, ENDINGS)) + "|/": Folder(),
    "": Tar(),
}


def format_of(path):
    """Returns the `Format` of a shard."""
    return next(
        format
        for ending, format in FORMATS.items()
        if re.search(f"({ending})$", path, re.IGNORECASE)
    )


def list_shards(source: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Lists the files of a source.

    Example:

    ```python
    kcm.data.list_shards("data/train-{00000..00003}.tar")  # four files, or an error
    kcm.data.list_shards(["data/train-*.tar", "more/{a,b}.tar"])
    ```

    Args:
        source: String or path, or a list of them. A file; a folder with one table,
            named `metadata`, `manifest` or `captions` with the extension `.csv`, `.tsv`
            or `.jsonl`; a folder of images, which may have subfolders; a pattern with
            `*`, `?` or `[...]` for all existing files that match it; or a pattern with
            `{a,b}` or `{000..123}`, for files that must all exist. Each may be a URL,
            such as `"s3://bucket/train-*.tar"`, or an fsspec chain, such as
            `"simplecache::s3://bucket/train-*.tar"`.

    Returns:
        A sorted list of strings without duplicates. A folder of images ends with `/`.

    Raises:
        FileNotFoundError: If a file is missing, or if no file matches a pattern.
        ImportError: If no installed package opens files at a URL.
        ValueError: If a folder has several tables.
    """
    return list(find_shards(source))


def find_shards(source):
    """Finds the shards of a source; see `list_shards`.

    Returns:
        Dictionary from the path of each shard to a string that changes with the shard.
    """
    is_list = isinstance(source, list | tuple | set)
    shards = {}
    for item in source if is_list else [source]:
        if not isinstance(item, str | os.PathLike):
            raise ValueError(
                "`source` must be a path, a list of paths, or an object that holds "
                "dicts. Split a list instead of listing parts, and pass a dict of "
                f"weights to `image_text_dataset` only. Received: source={item!r}"
            )
        item = os.fspath(item)
        if not files.is_address(item):
            item = os.path.normpath(os.path.expanduser(item))
        for path, info in expand(item).items():
            if info["type"] == "directory":
                path, info = _in_folder(path)
            shards[path] = stamp(info)
    if not shards:
        raise ValueError(
            f"`source` must name at least one file. Received: source={source!r}"
        )
    return dict(sorted(shards.items()))


def _in_folder(path):
    """Returns the table of a folder, or the folder itself, and its information."""
    path = path.rstrip("/") + "/"
    system, folder = files.file_system(path)
    infos = {info["name"].rpartition("/")[2]: info for info in system.ls(folder, True)}
    tables = [name for name in TABLES if name in infos]
    if len(tables) > 1:
        raise ValueError(
            "`source` must be a folder with one table: pass the path of a table "
            f"instead. Received: {path} with {', '.join(tables)}"
        )
    if tables:
        return path + tables[0], infos[tables[0]]
    images = images_in(path)
    if not images:
        raise FileNotFoundError(
            "`source` must name shards, for example "
            f"{os.path.join(path, '*.tar')!r}, or a folder that holds images, or a "
            f"table with a row per image, one of {TABLES}. Received a folder "
            f"without: {path}"
        )
    versions = [(name, text and stamp(text)) for name, text in images.items()]
    return path, {"size": len(images), "ETag": hash_of(versions)}


def expand(pattern):
    """Finds the files and folders that a pattern names, with their information.

    Args:
        pattern: String with `{a,b}`, `{000..123}`, `*`, `?` or `[...]`, or a name.

    Returns:
        Dictionary from each path to its information, as fsspec returns it.

    Raises:
        FileNotFoundError: If a file is missing, or if no file matches.
    """
    system, whole = files.file_system(pattern)
    names = [pattern]
    # A file may have braces in its name.
    if "{" in pattern and not system.exists(whole):
        names = list(braceexpand.braceexpand(pattern, escape=False))
    # A cached list lacks files that other programs have written since.
    system.invalidate_cache()
    paths = [files.file_system(name)[1] for name in names]
    if len(paths) > 1:
        for folder in {path.rpartition("/")[0] for path in paths}:
            # File systems keep the list. Web servers cannot list folders.
            with contextlib.suppress(OSError, NotImplementedError, ValueError):
                system.ls(folder)
    found = {}
    with Threads(min(len(paths), REQUESTS)) as threads:
        results = threads.map(_matching, itertools.repeat(system), paths)
        for name, matches in zip(names, results):
            if not matches:
                raise FileNotFoundError(
                    f"`source` must name files that exist. Received: {name}"
                )
            found.update(matches)
    if not files.is_address(pattern):
        return found
    # The first address of a chain, such as "zip://*.tar::b.zip", names the files.
    first = next(link for link in pattern.split("::") if files.is_address(link))
    return {
        pattern.replace(first, system.unstrip_protocol(path)): info
        for path, info in found.items()
    }


def _matching(system, path):
    """Returns the file of a name, or all files that match a pattern."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return {path: files.limited(system, system.info, path)}
    found = system.glob(path, detail=True)
    wants_hidden = path.rpartition("/")[2].startswith(".")
    # Skip hidden files, such as the index of a shard.
    return {
        name: found[name]
        for name in sorted(found)
        if wants_hidden or not name.rpartition("/")[2].startswith(".")
    }


def stamp(info):
    """Returns a string that changes with a file, from its size and its date or ETag."""
    names = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated")
    names += ("md5Hash", "created")
    version = next((info[name] for name in names if info.get(name)), "")
    return f"{info.get('size')} {version}"


def example_images() -> pathlib.Path:
    """Returns the folder of the captioned images that the guides train on.

    It contains 4,002 emoji and drawings of 64 pixels, each with a short caption, in
    WebDataset shards: `train-*.tar` (3,223 images), `validation-*.tar` (433) and
    `test-*.tar` (346). The folder `photographs` next to it contains six photographs of
    224 pixels.

    Example:

    ```python
    folder = kcm.data.example_images()
    captions = kcm.data.read_captions(folder / "test-*.tar")
    print(len(captions), captions[0])
    ```

    Returns:
        A `pathlib.Path`, the folder `images`.
    """
    return pathlib.Path(__file__).resolve().parents[1] / "datasets" / "images"
