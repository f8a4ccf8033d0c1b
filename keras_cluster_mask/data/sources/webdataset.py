"""WebDataset shards: tar files in which neighbouring files of a name are a sample."""

import bz2
import contextlib
import dataclasses
import gzip
import io
import lzma
import re
import tarfile

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import FAULT, Shard, ShardError

# No picture is so large; a damaged header may say so, and memory would be full.
MAX_BYTES = 2**28
# Blocks of zeros fill the last record of a tar; none is so long.
MAX_PADDING = 2**20
COMPRESSIONS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x5d\x00\x00\x80": lzma.open,
}


@dataclasses.dataclass(frozen=True)
class TarShard(Shard):
    """A tar, which may be compressed: `cat/07.jpg` with `cat/07.txt` is a sample.

    What follows the first dot of a name, in lower case, is the field. The tar is read
    as a stream: only one sample is in memory. One that is compressed is read twice, the
    first time to check it: of a damaged one nothing is given.
    """

    def read(self, fields=None):
        sample = {}
        try:
            with (
                files.open_file(self.path) as file,
                _decompressed(file) as content,
                tarfile.open(fileobj=content, mode="r|", tarinfo=_Header) as archive,
            ):
                while (member := _next(archive)) is not None:
                    # The archive would remember every member it has seen.
                    archive.members.clear()
                    key, field = _split_name(member.name)
                    link = member.islnk() or member.issym()
                    if not field or not (member.isfile() or link):
                        continue
                    if key != sample.get("__key__") or field in sample:
                        if sample:
                            yield sample
                        sample = {"__key__": key}
                    if not link and (fields is None or field in fields):
                        sample[field] = _content(archive, member)
                _check_end(archive.fileobj)
        except (FileNotFoundError, PermissionError):
            raise
        # Damaged compression may show as an OSError, EOFError or zlib.error.
        except Exception as error:
            raise ShardError(self, sample, str(error)) from error
        if sample:
            yield sample


class _Header(tarfile.TarInfo):
    # tarfile takes a damaged header, or none, for the end of the archive.
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


@contextlib.contextmanager
def _decompressed(file):
    """A file's content, if it is compressed after a check of all of it."""
    start = file.read(8)
    file.seek(0)
    decompress = next((v for k, v in COMPRESSIONS.items() if start.startswith(k)), None)
    if decompress is None:
        yield file
        return
    # A damaged byte may become another caption, and the checksum comes at the end.
    with decompress(file) as content:
        while content.read(2**20):
            pass
    file.seek(0)
    with decompress(file) as content:
        yield content


def _next(archive):
    """The next member; None at the end."""
    # The first was read when the archive was opened, but not its content.
    end = 0 if archive.firstmember else archive.offset
    # tarfile would read on beyond the end of the file, up to where a damaged header
    # says that its content ends.
    while (left := end - archive.fileobj.tell()) > 0:
        if not archive.fileobj.read(min(left, 2**20)):
            raise tarfile.ReadError("it breaks off within a file")
    return archive.next()


def _check_end(stream):
    """Raises an error unless padding alone follows the block that ended a tar."""
    rest = stream.read(MAX_PADDING + 1)
    # A header that was overwritten with zeros looks like the end.
    if rest.strip(b"\0") or len(rest) > MAX_PADDING:
        raise tarfile.ReadError("a block of zeros stands before its end")


def _content(archive, member):
    if member.size > MAX_BYTES:
        return None
    content = archive.extractfile(member).read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return content


def _split_name(name):
    folder, _, base = name.removeprefix("./").rpartition("/")
    base, _, field = base.partition(".")
    # Hidden files, such as the shadows macOS writes, have no name before the dot.
    field = field.lower()
    if not base or field in ("__key__", FAULT):
        return "", ""
    return (f"{folder}/{base}" if folder else base), field


class TarWriter:
    """Writes samples into a tar.

    Args:
        file: A binary file, open for writing.
    """

    def __init__(self, file):
        self._archive = tarfile.TarFile(
            fileobj=file, mode="w", format=tarfile.PAX_FORMAT
        )

    def write(self, key, fields):
        """Writes a sample.

        Args:
            key: str, as `tar_key` makes them.
            fields: dict from a field to its content, bytes.
        """
        for field, content in fields.items():
            member = tarfile.TarInfo(f"{key}.{field}")
            member.size = len(content)
            self._archive.addfile(member, io.BytesIO(content))
            # The archive would remember every member.
            self._archive.members.clear()

    def close(self):
        """Writes the end mark; the file stays open."""
        self._archive.close()


def tar_key(key):
    """A key as a tar can hold it: the first dot of a name would end it."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + re.sub(r"\.", "_", name)
