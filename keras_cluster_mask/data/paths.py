"""Opens sources: finds the files of paths, by their formats."""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import braceexpand

from keras_cluster_mask.data.files import Threads, file_system, is_address, limited
from keras_cluster_mask.data.formats.folder import ENDINGS, Folder
from keras_cluster_mask.data.formats.parquet import Parquet
from keras_cluster_mask.data.formats.table import TABLES, Table
from keras_cluster_mask.data.formats.tar import Tar
from keras_cluster_mask.data.samples import IMAGE_KEYS
from keras_cluster_mask.data.sources import Concatenation

# Formats by the endings of files. Files with any other name are read as tar files.
FORMATS = {
    (".csv", ".tsv", ".jsonl", ".ndjson"): Table,
    (".parquet",): Parquet,
    (*ENDINGS, "/"): Folder,
    ("",): Tar,
}
# The number of parallel requests for the size and date of files.
REQUESTS = 16
# What fsspec says about the version of a file, by the kind of storage.
VERSIONS = (
    *("ETag", "etag", "mtime", "LastModified", "last_modified", "updated"),
    *("md5Hash", "created"),
)


def open_source(source: Any, image_keys: Sequence[str] = IMAGE_KEYS) -> Any:
    """Returns the source that paths refer to, or a source itself.

    Args:
        source: See `image_text_dataset`. A list of sources is one, too.
        image_keys: Sequence of strings. The columns of tables that may hold the image.
            Rows with the same image form one sample.

    Raises:
        FileNotFoundError: If a file is missing, or if no file matches a pattern.
        ImportError: If no installed package opens files at a URL.
        ValueError: If it is no source, or a folder with several tables.
    """
    several = source if isinstance(source, list | tuple) else [source]
    if several and all(isinstance(each, str | os.PathLike) for each in several):
        found = dict(sorted(x for path in several for x in find_files(path).items()))
        opened = [
            kind({path: found[path] for path in paths}, image_keys)
            for kind, paths in itertools.groupby(found, format_of)
        ]
        return opened[0] if len(opened) == 1 else Concatenation(opened)
    if several is source and source and all(map(_is_source, source)):
        return Concatenation(source)
    if not _is_source(source):
        raise ValueError(
            "`source` must be a path, an object with `len` and dicts as items, or a "
            "list of only paths or only such objects. Instead of pairs, pass "
            "`[{'image': x, 'caption': y} for x, y in pairs]`. Instead of a DataFrame, "
            "pass `frame.to_dict('records')`. Load a streaming dataset without "
            "streaming. Pass a dict of weights to `image_text_dataset` only. Received: "
            f"source={type(source).__name__}"
        )
    return source


def _is_source(value):
    """Returns whether a value has a length, and dictionaries as items."""
    if isinstance(value, Mapping | str | bytes) or not hasattr(value, "__getitem__"):
        return False
    try:
        return not len(value) or isinstance(value[0], Mapping)
    # An item of a DataFrame is a column, and streams have no length.
    except (TypeError, KeyError):
        return False
    # The object may fail to decode its first image.
    except (OSError, SyntaxError):
        return True


def format_of(path):
    """Returns the class of the source that a file is."""
    endings = path.lower().endswith
    return next(kind for ends, kind in FORMATS.items() if endings(ends))


def find_files(pattern):
    """Finds the files that a path refers to.

    Args:
        pattern: String or path; see `image_text_dataset`.

    Returns:
        Dictionary from the path of each file to a string that changes with the file. A
        folder of images ends with `/`.
    """
    pattern = os.fspath(pattern)
    if not is_address(pattern):
        pattern = os.path.normpath(os.path.expanduser(pattern))
    system, whole = file_system(pattern)
    # A cached list lacks files that other programs have written since.
    system.invalidate_cache()
    names, paths = [pattern], [whole]
    # A file may have braces in its name.
    if "{" in pattern and not system.exists(whole):
        names = [*braceexpand.braceexpand(pattern, escape=False)]
        paths = [file_system(name)[1] for name in names]
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
            for path, info in matches.items():
                # The first address of a chain, such as "zip://*.tar::b.zip",
                # specifies the files.
                if is_address(pattern):
                    first = next(filter(is_address, pattern.split("::")))
                    path = pattern.replace(first, system.unstrip_protocol(path))
                if info["type"] == "directory":
                    path, info = _in_folder(system, path, info)
                version = next((info[x] for x in VERSIONS if info.get(x)), "")
                found[path] = f"{info.get('size')} {version}"
    return found


def _matching(system, path):
    """Returns the file of a name, or all files that match a pattern."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return {path: limited(system, system.info, path)}
    found = system.glob(path, detail=True)
    hidden = [name for name in found if name.rpartition("/")[2].startswith(".")]
    return {name: _of_link(system, found[name]) for name in found if name not in hidden}


def _of_link(system, info):
    """Returns the information of what a link points at, instead of its own."""
    return system.info(info["name"]) if info.get("islink") else info


def _in_folder(system, folder, info):
    """Returns the table of a folder, or the folder itself, and its information."""
    inside = system.ls(info["name"], detail=True)
    infos = {each["name"].rpartition("/")[2]: each for each in inside}
    tables = [name for name in TABLES if name in infos]
    folder = folder.rstrip("/") + "/"
    if len(tables) > 1:
        raise ValueError(
            "`source` must be a folder with at most one table: pass the path of one of "
            f"the tables instead. Received: {folder} with {', '.join(tables)}"
        )
    if not tables:
        return folder, info
    return folder + tables[0], _of_link(system, infos[tables[0]])


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
