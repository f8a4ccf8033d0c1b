"""The formats of shards, each in a file of this folder."""

import hashlib
import os
import re

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.base import (
    DamagedShard,
    Entry,
    Format,
    NoRandomAccess,
)
from keras_cluster_mask.data.formats.folder import ENDINGS, Folder, images_in
from keras_cluster_mask.data.formats.parquet import Parquet
from keras_cluster_mask.data.formats.table import Table, find_table
from keras_cluster_mask.data.formats.tar import Tar
from keras_cluster_mask.data.formats.tfrecord import TFRecord

__all__ = [
    "DamagedShard",
    "Entry",
    "Format",
    "NoRandomAccess",
    "find_shards",
    "format_of",
    "list_shards",
]

# By the extension of a file; a file with any other name is read as a tar.
FORMATS = {
    r"\.tfrec(ords?)?(\.gz)?": TFRecord(),
    r"\.csv": Table(","),
    r"\.tsv": Table("\t"),
    r"\.(jsonl|ndjson)": Table(None),
    r"\.parquet": Parquet(),
    "|".join(map(re.escape, ENDINGS)) + "|/": Folder(),
    "": Tar(),
}


def format_of(path):
    """The `Format` of a shard."""
    for ending, format in FORMATS.items():
        if re.search(f"({ending})$", path, re.IGNORECASE):
            return format


def list_shards(source):
    """Lists the files that a source names.

    Example:

    ```python
    kcm.data.list_shards("data/train-{00000..00003}.tar")  # four files, or an error
    kcm.data.list_shards(["data/train-*.tar", "more/{a,b}.tar"])
    ```

    Args:
        source: str or path, or a list of them. A file; a folder with a table,
            `metadata.csv`, `.tsv` or `.jsonl`; a folder of images, which may have
            subfolders; a pattern with `*`, `?` or `[...]` for all existing files that
            match it; or a pattern with `{a,b}` or `{000..123}`, each of whose files
            must exist. Each may be an address, such as `"s3://bucket/train-*.tar"`.

    Returns:
        A sorted list of str without duplicates. A folder of images ends with `/`.

    Raises:
        FileNotFoundError: If a file is missing, or if no file matches a pattern.
        ImportError: If no installed package opens files at an address.
    """
    return list(find_shards(source))


def find_shards(source):
    """The shards of a source; see `list_shards`.

    Returns:
        dict from the path of each shard to a str that differs if the shard changes.
    """
    is_list = isinstance(source, list | tuple | set)
    shards = {}
    for item in source if is_list else [source]:
        if not isinstance(item, str | os.PathLike):
            raise ValueError(
                "`source` must be a str or path, a list of them, a dict from them to "
                "weights, or an object with `__len__` and `__getitem__`. "
                f"Received: {source!r}"
            )
        item = os.fspath(item)
        if item.startswith("pipe:"):
            raise ValueError(
                "`source` must be shards that can be read in any order, not the output "
                "of a command. Write it to files, or convert what the command reads: "
                "`python -m keras_cluster_mask.data convert ADDRESS --to "
                f"'shards/train-{{00000}}.tar'`. Received: {item}"
            )
        if not files.is_address(item):
            item = os.path.normpath(os.path.expanduser(item))
        for path, info in files.expand(item).items():
            if info["type"] == "directory":
                path, info = _in_folder(path)
            shards[path] = files.stamp(info)
    if not shards:
        raise ValueError(f"`source` must name at least one shard. Received: {source}")
    return dict(sorted(shards.items()))


def _in_folder(path):
    """The table of a folder, or the folder itself, and its information."""
    path = path.rstrip("/") + "/"
    system, folder = files.file_system(path)
    infos = {info["name"].rpartition("/")[2]: info for info in system.ls(folder, True)}
    table = find_table(path, infos)
    if table:
        return table, infos[table.rpartition("/")[2]]
    images = images_in(path)
    if not images:
        raise FileNotFoundError(
            "`source` must name shards, for example "
            f"{os.path.join(path, '*.tar')!r}, or a folder that holds metadata.csv, "
            ".tsv or .jsonl with a row per image, or images. Received a folder "
            f"without: {path}"
        )
    digest = hashlib.blake2b(
        "\0".join(images).encode("utf-8", "surrogateescape"), digest_size=8
    )
    return path, {"size": len(images), "ETag": digest.hexdigest()}
