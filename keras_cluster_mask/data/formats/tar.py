"""WebDataset shards: tar files in which consecutive files of one name form a sample."""

import contextlib
import io
import posixpath
import tarfile

from keras_cluster_mask.data import files
from keras_cluster_mask.data.samples import (
    DamagedShard,
    Entry,
    Format,
    entries_of,
    filled,
    json_object,
)

BLOCK = 512
MAX_ENTRIES = 32
# An upper bound of the zero padding at the end of a tar file.
MAX_PADDING = 2**20


class Tar(Format):
    """Tar files: `cat/07.jpg` and `cat/07.txt` are the sample `cat/07`.

    The name of a field is the file name after its first dot, in lower case.
    """

    noun = "shard"

    def scan(self, path):
        # A truncated file does not show how large it was.
        last, share = None, 0.0
        try:
            with files.open_file(path) as file:
                # First, since it discards what has been read ahead.
                length = file.seek(0, io.SEEK_END)
                file.seek(0)
                archive = tarfile.TarFile(fileobj=file, tarinfo=_Header)
                for entry in _samples(archive, length):
                    yield entry
                    last, share = entry.key, sum(entry.place) / length
                file.seek(archive.offset + BLOCK)
                rest = file.read(MAX_PADDING + 1)
                # A header overwritten with zeros looks like the end mark.
                if rest.strip(b"\0") or len(rest) > MAX_PADDING:
                    raise tarfile.ReadError("a block of zeros comes before its end")
        except OSError:
            raise
        # Damaged headers raise many kinds of errors.
        except Exception as error:
            if last is None and not path.lower().endswith(".tar"):
                raise ValueError(
                    "`source` must be files with random access, but this is a "
                    "compressed file, or one of unknown format: use tar, Parquet, CSV, "
                    "TSV or JSON lines, without compression. Read TFRecord files with "
                    "`tf.data.TFRecordDataset`, and pass its batches to `fit`. "
                    f"Received: source={path!r}"
                ) from error
            if isinstance(error, EOFError):
                share = 0.0
            raise DamagedShard(path, last, str(error), share) from error

    def parse(self, content, number, context):
        archive = tarfile.TarFile(fileobj=io.BytesIO(content), tarinfo=_Header)
        found, fields = "", {}
        while (member := archive.next()) is not None:
            key, field = _key_and_field(member)
            if field:
                found, start = key, member.offset_data
                fields[field] = content[start : start + member.size]
            # The bytes of one sample do not end with an end mark.
            if archive.offset >= len(content):
                break
        return found, filled(fields)


def _samples(archive, length):
    """Yields the `Entry` of each sample."""
    sample, seen = None, set()
    while (member := archive.next()) is not None:
        # Otherwise the archive would keep every member in memory.
        archive.members.clear()
        if archive.offset <= member.offset:
            raise tarfile.ReadError(f"{member.name} has an invalid size")
        if archive.offset > length:
            raise EOFError("it is truncated within a file")
        key, field = _key_and_field(member)
        if not field:
            continue
        if sample is None or key != sample.key or field in seen:
            if sample is not None:
                yield sample
            start, sample, seen = member.offset, Entry(key, (0, 0), {}), set()
        sample = sample._replace(place=(start, archive.offset - start))
        seen.add(field)
        if member.size:
            sample.fields[field] = member.size
        if field == "json":
            archive.fileobj.seek(member.offset_data)
            entries = json_object(archive.fileobj.read(member.size)) or {}
            names = [f"json.{name}" for name in filled(entries)]
            # With more names, nearly every sample might need its own layout.
            if len(names) <= MAX_ENTRIES:
                sample.fields.update(dict.fromkeys([entries_of("json"), *names]))
    if sample is not None:
        yield sample


class _Header(tarfile.TarInfo):
    __slots__ = ()

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        # A fast path for plain files with short names takes a third of the time. It
        # does not read dates and owners.
        if buf[156:157] == tarfile.REGTYPE and not any(buf[345:346]):
            with contextlib.suppress(ValueError):
                total = sum(buf) - sum(buf[148:156]) + 8 * ord(" ")
                if len(buf) == BLOCK and int(buf[148:154], 8) == total:
                    member = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
                    member.size = int(buf[124:135], 8)
                    return member
        return super().frombuf(buf, encoding, errors)

    # tarfile treats a damaged or missing header as the end of the archive.
    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            # Even an empty archive ends with two blocks of zeros.
            kind = tarfile.ReadError if archive.fileobj.read(1) else EOFError
            raise kind(f"no file or end mark follows: {error}") from error


def _key_and_field(member):
    """Returns the key and field of a member, or empty strings if it is unrelated."""
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    base, _, field = base.partition(".")
    # Links and sparse files lack their plain content. Hidden files, such as on macOS,
    # have no name before the dot.
    if not member.isfile() or member.issparse() or not base or not field:
        return "", ""
    return posixpath.join(folder, base), field.lower()
