"""Tar shards: which ones there are, and the samples inside, one after another."""

import glob
import os
import pathlib
import re
import tarfile


class ShardError(ValueError):
    """A shard that cannot be read to its end.

    Attributes:
        shard: str. The file.
        sample: dict. The sample that was being read, as far as it was; it may be whole.
        last_key: str. Its key; None if there was no sample yet.
    """

    def __init__(self, shard, sample, reason):
        self.shard = shard
        self.sample = sample
        self.last_key = last_key = sample.get("__key__")
        place = f"at or after the sample {last_key!r}" if last_key else "at its start"
        super().__init__(f"The shard {shard} is damaged {place}: {reason}")


def list_shards(source):
    """The files a description of shards stands for.

    Example:

    ```python
    kcm.data.list_shards("data/train-{00000..00003}.tar")  # these four, or an error
    kcm.data.list_shards(["data/train-*.tar", "more/{a,b}.tar"])  # what is there
    ```

    Args:
        source: str or path, or a list of them. A file; a pattern with `*`, `?` or
            `[...]` that stands for the files that are there; a pattern with `{a,b}` or
            `{000..123}` that stands for exactly these.

    Returns:
        A sorted list of str without duplicates.

    Raises:
        FileNotFoundError: if a file is missing, or a pattern finds none.
    """
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    shards = {shard for item in sources for shard in _find(os.fspath(item))}
    if not shards:
        raise ValueError(f"`source` must name at least one shard. Received: {source}")
    return sorted(shards)


def _find(pattern):
    pattern = os.path.expanduser(pattern)
    for name in [pattern] if os.path.exists(pattern) else _expand_braces(pattern):
        if os.path.isdir(name):
            raise FileNotFoundError(
                "`source` must name tar files, for example "
                f"{os.path.join(name, '*.tar')!r}. Received a folder: {name}"
            )
        found = [name] if os.path.exists(name) else glob.glob(name)
        if not found:
            kind = "pattern that no file matches" if glob.has_magic(name) else "missing"
            raise FileNotFoundError(
                f"`source` must name shards that exist. Received ({kind}): {name}"
            )
        yield from found


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


class _Header(tarfile.TarInfo):
    """A header that reports damage, which `tarfile` takes for the end of the file."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.EmptyHeaderError as error:
            # Even an archive of nothing ends with two blocks of zeros.
            raise tarfile.ReadError("it breaks off without an end mark") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def read_samples(shard, extensions=None):
    """The samples of a WebDataset shard, in order and one at a time.

    Neighbouring files of one name make a sample, `cat/07.jpg` with `cat/07.txt`; what
    follows the first dot says what they are. The tar is read as a stream: only one
    sample is in memory.

    Args:
        shard: str or path. A tar file, which may be compressed.
        extensions: collection of str. Read only files of these extensions; samples
            without any still come, with their key alone. Defaults to `None`: all.

    Yields:
        dict: `"__key__"` (str) and the content of each file under its lower-case
        extension (bytes).

    Raises:
        ShardError: if the tar breaks off or is no tar, after all whole samples but the
            one that was being read, which the error holds.
    """
    shard = os.fspath(shard)
    sample = {}
    try:
        with (
            pathlib.Path(shard).open("rb") as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as archive,
        ):
            while (member := archive.next()) is not None:
                # The archive would remember every member it has seen.
                archive.members.clear()
                key, extension = _split_name(member.name)
                if not member.isfile() or not extension:
                    continue
                if key != sample.get("__key__") or extension in sample:
                    if sample:
                        yield sample
                    sample = {"__key__": key}
                if extensions is None or extension in extensions:
                    content = archive.extractfile(member).read()
                    if len(content) != member.size:
                        raise tarfile.ReadError(f"{member.name} is cut short")
                    sample[extension] = content
    except (FileNotFoundError, PermissionError):
        raise
    # Damaged compression may show as an OSError or EOFError.
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(shard, sample, str(error)) from error
    if sample:
        yield sample


def _split_name(name):
    folder, _, base = name.removeprefix("./").rpartition("/")
    base, _, extension = base.partition(".")
    # Hidden files, such as the shadows macOS writes, have no name before the dot.
    if not base:
        return "", ""
    return (f"{folder}/{base}" if folder else base), extension.lower()
