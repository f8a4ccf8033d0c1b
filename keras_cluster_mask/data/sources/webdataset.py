"""WebDataset shards: tar files, in which consecutive files of one name are a sample."""

import bz2
import contextlib
import dataclasses
import gzip
import lzma
import tarfile

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import FAULT, Shard, ShardError

# A damaged header may claim more than any image has and would fill the memory.
MAX_BYTES = 2**28
# More than the zeros that fill the last record of a tar.
MAX_PADDING = 2**20
COMPRESSIONS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x5d\x00\x00\x80": lzma.open,
}


@dataclasses.dataclass(frozen=True)
class TarShard(Shard):
    """A tar, optionally compressed: `cat/07.jpg` and `cat/07.txt` are a sample.

    The field is the part of the name after its first dot, in lower case. The tar is
    read as a stream, with one sample in memory. A compressed tar is read twice, first
    to check it, so that no sample of a damaged one is returned.
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
                    # The archive would keep every member in memory.
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
        # Damaged compression may raise an OSError, EOFError or zlib.error.
        except Exception as error:
            raise ShardError(self, sample, str(error)) from error
        if sample:
            yield sample


class _Header(tarfile.TarInfo):
    # tarfile takes a damaged or missing header as the end of the archive.
    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.EmptyHeaderError as error:
            # Even an empty archive ends with two blocks of zeros.
            raise tarfile.ReadError("it ends without an end mark") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


@contextlib.contextmanager
def _decompressed(file):
    """The decompressed content of a file, after a check of all of it."""
    start = file.read(8)
    file.seek(0)
    decompress = next((v for k, v in COMPRESSIONS.items() if start.startswith(k)), None)
    if decompress is None:
        yield file
        return
    # A damaged byte may give a wrong caption, and the checksum is at the end.
    with decompress(file) as content:
        while content.read(2**20):
            pass
    file.seek(0)
    with decompress(file) as content:
        yield content


def _next(archive):
    """The next member, or None at the end."""
    # Opening the archive read the header of the first member, not its content.
    end = 0 if archive.firstmember else archive.offset
    # With a damaged header, tarfile would seek beyond the end of the file.
    while (left := end - archive.fileobj.tell()) > 0:
        if not archive.fileobj.read(min(left, 2**20)):
            raise tarfile.ReadError("it is truncated within a file")
    return archive.next()


def _check_end(stream):
    """Raises an error unless only padding follows the end mark of a tar."""
    rest = stream.read(MAX_PADDING + 1)
    # A header that was overwritten with zeros looks like the end mark.
    if rest.strip(b"\0") or len(rest) > MAX_PADDING:
        raise tarfile.ReadError("a block of zeros comes before its end")


def _content(archive, member):
    if member.size > MAX_BYTES:
        return None
    content = archive.extractfile(member).read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} is truncated")
    return content


def _split_name(name):
    folder, _, base = name.removeprefix("./").rpartition("/")
    base, _, field = base.partition(".")
    # Hidden files, such as those of macOS, have no name before the dot.
    field = field.lower()
    if not base or field in ("__key__", FAULT):
        return "", ""
    return (f"{folder}/{base}" if folder else base), field
