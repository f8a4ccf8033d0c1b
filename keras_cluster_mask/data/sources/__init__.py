"""Where samples lie: a kind of shard a file, and which file is of which kind."""

import os
import re

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.folder import ENDINGS, folder_parts, pictures_in
from keras_cluster_mask.data.sources.manifest import find_manifest, manifest_parts
from keras_cluster_mask.data.sources.shard import Shard, ShardError
from keras_cluster_mask.data.sources.tfrecord import RecordShard
from keras_cluster_mask.data.sources.webdataset import TarShard

__all__ = ["Shard", "ShardError", "find_shards", "list_shards", "read_samples"]

# By the end of a file's name; whatever is called otherwise is taken for a tar.
KINDS = {
    r"\.tfrec(ords?)?(\.gz)?": lambda path: [RecordShard(path)],
    r"\.(csv|tsv|jsonl|ndjson)": manifest_parts,
    "|".join(map(re.escape, ENDINGS)): folder_parts,
    "": lambda path: [TarShard(path)],
}


def list_shards(source):
    """The files a description of shards stands for.

    Example:

    ```python
    kcm.data.list_shards("data/train-{00000..00003}.tar")  # these four, or an error
    kcm.data.list_shards(["data/train-*.tar", "more/{a,b}.tar"])  # what is there
    ```

    Args:
        source: str or path, or a list of them. A file; a folder that holds a manifest,
            `metadata.csv`, `.tsv` or `.jsonl`, or nothing but pictures, also in
            folders of its own; a pattern with `*`, `?` or `[...]` that
            stands for the files that are there; a pattern with `{a,b}` or `{000..123}`
            that stands for exactly these. Each may be an address, such as
            `"s3://bucket/train-*.tar"`.

    Returns:
        A sorted list of str without duplicates.

    Raises:
        FileNotFoundError: if a file is missing, or a pattern finds none.
        ImportError: if nothing that is installed opens files at an address.
    """
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    shards = {shard for item in sources for shard in _find(os.fspath(item))}
    if not shards:
        raise ValueError(f"`source` must name at least one shard. Received: {source}")
    return sorted(shards)


def find_shards(source):
    """The shards a description stands for, to be read.

    Args:
        source: As for `list_shards`. A manifest becomes several shards, so many rows
            each.

    Returns:
        A list of `Shard`.
    """
    return [shard for path in list_shards(source) for shard in _shards_in(path)]


def read_samples(path, fields=None):
    """The samples of a file, in order and one at a time.

    Args:
        path: str or path. A tar, a TFRecord file, a manifest, a picture or a folder of
            pictures.
        fields: collection of str. Read only these; samples without any still come, with
            their key alone. Defaults to `None`: all.

    Yields:
        dict: `"__key__"` (str) and what each field holds.

    Raises:
        ShardError: if the file breaks off or is of no known kind, after all whole
            samples but the one that was being read, which the error holds.
    """
    for shard in _shards_in(os.fspath(path)):
        yield from shard.read(fields)


def _shards_in(path):
    if files.is_folder(path):
        return folder_parts(path)
    for ending, shards in KINDS.items():
        if re.search(f"({ending})$", path, re.IGNORECASE):
            return shards(path)


def _find(pattern):
    pattern = os.path.expanduser(pattern)
    for name in [pattern] if files.exists(pattern) else _expand_braces(pattern):
        if files.is_folder(name):
            yield find_manifest(name) or _with_pictures(name)
            continue
        found = [name] if files.exists(name) else files.matching(name)
        if not found:
            magic = re.search(r"[*?\[]", name)
            kind = "pattern that no file matches" if magic else "missing"
            raise FileNotFoundError(
                f"`source` must name shards that exist. Received ({kind}): {name}"
            )
        yield from found


def _with_pictures(folder):
    if pictures_in(folder):
        return folder
    raise FileNotFoundError(
        "`source` must name shards, for example "
        f"{os.path.join(folder, '*.tar')!r}, or a folder that holds metadata.csv, .tsv "
        "or .jsonl with a row a picture, or pictures. Received a folder without: "
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
