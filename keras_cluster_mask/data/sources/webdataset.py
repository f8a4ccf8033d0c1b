"""WebDataset shards: tar files, in which consecutive files of one name are a sample."""

import bz2
import contextlib
import dataclasses
import gzip
import io
import lzma
import tarfile

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.folder import ENDINGS
from keras_cluster_mask.data.sources.shard import (
    FAULT,
    IMAGE,
    TEXT,
    TOO_LARGE,
    Entry,
    NoRandomAccess,
    Shard,
    ShardError,
    state_in_file,
)

# A damaged header may claim more than any image has and would fill the memory.
MAX_BYTES = 2**28
# More than the zeros that fill the last record of a tar.
MAX_PADDING = 2**20
# A block of a tar, in bytes.
BLOCK = 512
# A header, a caption and the next header, and the byte before that tarfile reads.
HEADERS = 5 * BLOCK
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
        sample, seen = {}, set()
        try:
            with (
                files.open_file(self.path) as file,
                _decompressed(file) as content,
                tarfile.open(fileobj=content, mode="r|", tarinfo=_Header) as archive,
            ):
                while (member := _next(archive)) is not None:
                    # The archive would keep every member in memory.
                    archive.members.clear()
                    key, field = _key_and_field(member)
                    if not field:
                        continue
                    if key != sample.get("__key__") or field in seen:
                        if sample:
                            yield sample
                        sample, seen = {"__key__": key}, set()
                    if _is_link(member):
                        continue
                    seen.add(field)
                    if fields is None or field in fields:
                        sample[field] = _content(archive, member)
                _check_end(archive.fileobj)
        except (FileNotFoundError, PermissionError):
            raise
        # Damaged compression may raise an OSError, EOFError or zlib.error.
        except Exception as error:
            raise ShardError(self, sample, str(error)) from error
        if sample:
            yield sample

    def scan(self):
        entry = None
        try:
            with files.open_file(self.path, buffering=HEADERS) as file:
                if _compression(file):
                    raise NoRandomAccess(self.path)
                length = file.seek(0, io.SEEK_END)
                file.seek(0)
                archive = tarfile.TarFile(fileobj=file, tarinfo=_Header)
                while (member := archive.next()) is not None:
                    archive.members.clear()
                    if archive.offset <= member.offset:
                        raise tarfile.ReadError(f"{member.name} has an invalid size")
                    key, field = _key_and_field(member)
                    if not field:
                        continue
                    if entry is None or key != entry.key or field in entry.fields:
                        if entry is not None:
                            yield entry
                        entry = Entry(key, member.offset, 0, {})
                    sparse = member.sparse is not None
                    if not sparse and member.offset_data + member.size > length:
                        raise tarfile.ReadError("it is truncated within a file")
                    if not _is_link(member):
                        entry.fields[field] = _state(file, member, field)
                    entry = entry._replace(size=archive.offset - entry.offset)
                file.seek(archive.offset + BLOCK)
                _check_end(file)
        except (FileNotFoundError, PermissionError, NoRandomAccess):
            raise
        except Exception as error:
            if entry is not None:
                yield entry._replace(incomplete=True)
            last = {} if entry is None else {"__key__": entry.key}
            raise ShardError(self, last, str(error)) from error
        if entry is not None:
            yield entry

    def sample_at(self, content, number, context, fields=None):
        sample = {}
        archive = tarfile.TarFile(fileobj=io.BytesIO(content), tarinfo=_Header)
        while True:
            member = archive.next()
            key, field = _key_and_field(member)
            if field:
                sample.setdefault("__key__", key)
                if not _is_link(member) and (fields is None or field in fields):
                    sample[field] = _content(archive, member)
            if archive.offset >= len(content):
                return sample


class _Header(tarfile.TarInfo):
    __slots__ = ()

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        # A plain file with a short name, in a third of the time. Its dates and owner
        # stay unread.
        size, checksum = buf[124:135], buf[148:154]
        if buf[156:157] == tarfile.REGTYPE and not any(buf[345:346]):
            with contextlib.suppress(ValueError):
                total = sum(buf) - sum(buf[148:156]) + 8 * ord(" ")
                if len(buf) == BLOCK and int(checksum, 8) == total:
                    member = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
                    member.size = int(size, 8)
                    return member
        return super().frombuf(buf, encoding, errors)

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


def _compression(file):
    """What opens the content of a compressed file; None if it is not compressed."""
    start = file.read(8)
    file.seek(0)
    return next((v for k, v in COMPRESSIONS.items() if start.startswith(k)), None)


@contextlib.contextmanager
def _decompressed(file):
    """The decompressed content of a file, after a check of all of it."""
    decompress = _compression(file)
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


def _state(file, member, field):
    """What a file of a tar can be; see `Entry.fields`."""
    if member.size > MAX_BYTES:
        return TOO_LARGE
    if f".{field}".endswith(ENDINGS) or member.sparse is not None:
        return IMAGE | TEXT
    file.seek(member.offset_data)
    return state_in_file(file, member.size)


def _is_link(member):
    return member.islnk() or member.issym()


def _key_and_field(member):
    """The key and the field of a member, or empty if it is no part of a sample."""
    if not (member.isfile() or _is_link(member)):
        return "", ""
    return _split_name(member.name)


def _split_name(name):
    folder, _, base = name.removeprefix("./").rpartition("/")
    base, _, field = base.partition(".")
    # Hidden files, such as those of macOS, have no name before the dot.
    field = field.lower()
    if not base or field in ("__key__", FAULT):
        return "", ""
    return (f"{folder}/{base}" if folder else base), field
