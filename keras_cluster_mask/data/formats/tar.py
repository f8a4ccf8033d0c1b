"""WebDataset shards: tar files in which consecutive files of one name form a sample."""

import contextlib
import io
import itertools
import operator
import posixpath
import tarfile

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.indexed import DamagedFile, IndexedFiles, Row
from keras_cluster_mask.data.samples import BrokenSample

BLOCK = 512
# An upper bound of the zero padding at the end of a tar file.
MAX_PADDING = 2**20


class Tar(IndexedFiles):
    """Tar files: `cat/07.jpg` and `cat/07.txt` are the sample `cat/07`.

    The name of a field is the file name after its first dot, in lower case.
    """

    noun = "shard"

    def __init__(self, stamps, image_keys=()):
        # The index does not depend on the fields.
        super().__init__(stamps, ())

    def scan(self, path, context):
        last, archive, length = None, None, 0
        try:
            with files.open_file(path) as file:
                # First, since it discards what has been read ahead.
                length = file.seek(0, io.SEEK_END)
                file.seek(0)
                archive = tarfile.TarFile(fileobj=file, tarinfo=_Header)
                members = itertools.chain.from_iterable(
                    read(archive, length) for read in (_members, _end)
                )
                for key, group in itertools.groupby(members, operator.itemgetter(0)):
                    _, fields, infos = zip(*group)
                    start, blocks = infos[0].offset, -(-infos[-1].size // BLOCK)
                    size = infos[-1].offset_data + blocks * BLOCK - start
                    facts = repr((key, fields, [info.size for info in infos]))
                    yield Row((start, size), facts.encode("utf-8", "surrogateescape"))
                    last = key
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
                    "`source` must be uncompressed tar, Parquet, CSV, TSV or JSON "
                    "Lines files, which allow random access. This file is compressed "
                    "or in an unknown format. Read TFRecord files with "
                    "`tf.data.TFRecordDataset`, and pass the batches to `fit`. "
                    f"Received: source={path!r}"
                ) from error
            place = archive.offset if archive else length
            is_cut = isinstance(error, EOFError) or place >= length
            lost = None if is_cut else 1 - place / length
            raise DamagedFile(path, last, str(error), lost) from error

    def parse(self, content, number, context):
        archive = tarfile.TarFile(fileobj=io.BytesIO(content), tarinfo=_Header)
        members = [*_members(archive, len(content))]
        fields = {}
        for _, field, member in members:
            start = member.offset_data
            fields[field] = content[start : start + member.size]
        if len(fields) < len(members):
            raise BrokenSample("two files with the same name")
        return members[0][0], fields


def _members(archive, length):
    """Yields the key, the field and the `tarfile.TarInfo` of each file."""
    while (member := archive.next()) is not None:
        # Otherwise the archive would keep every member in memory.
        archive.members.clear()
        if archive.offset <= member.offset:
            raise tarfile.ReadError(f"{member.name} has an invalid size")
        if member.offset_data + member.size > length:
            raise EOFError("it ends in the middle of a file")
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        base, _, field = base.partition(".")
        # Links and sparse files lack their plain content. Hidden files, such as on
        # macOS, have no name before the dot.
        if member.isfile() and not member.issparse() and base and field:
            yield posixpath.join(folder, base), field.lower(), member


def _end(archive, length):
    """Raises an error if tarfile took a damaged header for the end of a tar."""
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError("no file header or end-of-archive marker follows")
    return ()


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
