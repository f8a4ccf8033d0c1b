"""Finds and reads shards; each format has a file in this folder."""

import os
import re

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.folder import (
    ENDINGS,
    folder_parts,
    images_in,
    whole_folder,
)
from keras_cluster_mask.data.sources.manifest import (
    find_manifest,
    manifest_parts,
    whole_manifest,
)
from keras_cluster_mask.data.sources.shard import Shard, ShardError
from keras_cluster_mask.data.sources.tfrecord import RecordShard
from keras_cluster_mask.data.sources.webdataset import TarShard

__all__ = [
    "Shard",
    "ShardError",
    "find_shards",
    "list_shards",
    "read_samples",
    "whole_shard",
]

# By the extension of a file; a file with any other name is read as a tar. What finds
# the shards in a file, and what makes a single shard of it.
KINDS = {
    r"\.tfrec(ords?)?(\.gz)?": (lambda path: [RecordShard(path)], RecordShard),
    r"\.(csv|tsv|jsonl|ndjson)": (manifest_parts, whole_manifest),
    "|".join(map(re.escape, ENDINGS)): (folder_parts, whole_folder),
    "": (lambda path: [TarShard(path)], TarShard),
}
NAMES_OF_FILES = "|".join([r"\.tar", *filter(None, KINDS)])


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
        A sorted list of str without duplicates.

    Raises:
        FileNotFoundError: If a file is missing, or if no file matches a pattern.
        ImportError: If no installed package opens files at an address.
    """
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    shards = {shard for item in sources for shard in _find(os.fspath(item))}
    if not shards:
        raise ValueError(f"`source` must name at least one shard. Received: {source}")
    return sorted(shards)


def find_shards(source):
    """The shards of a source.

    Args:
        source: As for `list_shards`. A table becomes several shards of equal numbers
            of rows.

    Returns:
        A list of `Shard`.
    """
    return [shard for path in list_shards(source) for shard in _shards_in(path)]


def read_samples(path, fields=None):
    """Reads the samples of a file in order.

    Args:
        path: str or path. A tar, a TFRecord file, a table, an image or a folder of
            images.
        fields: collection of str. Read only these fields. A sample without any of them
            is a dict with its key alone. Defaults to `None`: all fields.

    Yields:
        dict: `"__key__"` (str) and the content of each field.

    Raises:
        ShardError: If the file is damaged or has an unknown format. It is raised after
            the last complete sample and holds the sample that was being read.
    """
    for shard in _shards_in(os.fspath(path)):
        yield from shard.read(fields)


def whole_shard(path):
    """A file as a single `Shard`, for an index; see `find_shards`."""
    # At an address this question is a request.
    is_file = files.is_address(path) and re.search(rf"({NAMES_OF_FILES})$", path)
    is_folder = not is_file and files.is_folder(path)
    return whole_folder(path) if is_folder else _kind(path)[1](path)


def _shards_in(path):
    return folder_parts(path) if files.is_folder(path) else _kind(path)[0](path)


def _kind(path):
    return next(
        kind
        for ending, kind in KINDS.items()
        if re.search(f"({ending})$", path, re.IGNORECASE)
    )


def _find(pattern):
    pattern = os.path.expanduser(pattern)
    for name in [pattern] if files.exists(pattern) else _expand_braces(pattern):
        if files.is_folder(name):
            yield find_manifest(name) or _with_images(name)
            continue
        found = [name] if files.exists(name) else files.matching(name)
        if not found:
            magic = re.search(r"[*?\[]", name)
            kind = "pattern that no file matches" if magic else "missing"
            raise FileNotFoundError(
                f"`source` must name shards that exist. Received ({kind}): {name}"
            )
        yield from found


def _with_images(folder):
    if images_in(folder):
        return folder
    raise FileNotFoundError(
        "`source` must name shards, for example "
        f"{os.path.join(folder, '*.tar')!r}, or a folder that holds metadata.csv, .tsv "
        "or .jsonl with a row per image, or images. Received a folder without: "
        f"{folder}"
    )


def _expand_braces(pattern):
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    body = match[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", body):
        first, last = numbers.groups()
        choices = [
            str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)
        ]
        if not choices:
            raise ValueError(
                "`source` must count upwards between its braces. Received: " + pattern
            )
    elif "," in body:
        choices = body.split(",")
    else:
        raise ValueError(
            "`source` must hold `{first..last}` or `{a,b}` between its braces. "
            f"Received: {pattern}"
        )
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for each in choices for name in _expand_braces(before + each + after)]
