"""WebDataset shards: tar files in which neighbouring files of a name are a sample."""

import dataclasses
import io
import re
import tarfile

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import Shard, ShardError

# No picture is so large; a damaged header may say so, and memory would be full.
MAX_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class TarShard(Shard):
    """A tar, which may be compressed: `cat/07.jpg` with `cat/07.txt` is a sample.

    What follows the first dot of a name, in lower case, is the field. The tar is read
    as a stream: only one sample is in memory.
    """

    def read(self, fields=None):
        sample = {}
        try:
            with (
                files.open_file(self.path) as file,
                tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as archive,
            ):
                while (member := archive.next()) is not None:
                    # The archive would remember every member it has seen.
                    archive.members.clear()
                    key, field = _split_name(member.name)
                    if not member.isfile() or not field:
                        continue
                    if key != sample.get("__key__") or field in sample:
                        if sample:
                            yield sample
                        sample = {"__key__": key}
                    if fields is None or field in fields:
                        sample[field] = _content(archive, member)
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
    if not base:
        return "", ""
    return (f"{folder}/{base}" if folder else base), field.lower()


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
