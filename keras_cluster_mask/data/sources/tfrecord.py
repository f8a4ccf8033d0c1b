"""TFRecord files, in which each `tf.train.Example` is a sample."""

import contextlib
import dataclasses
import gzip
import shutil
import tempfile

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import Shard, ShardError

try:
    import tensorflow as tf
except ImportError:
    tf = None

KEYS = ("__key__", "key", "image/filename", "image/id")
# The length of a record and the two checksums, in bytes.
FRAME = 16


@dataclasses.dataclass(frozen=True)
class RecordShard(Shard):
    """A TFRecord file, optionally compressed, whose features are the fields.

    A feature with one value is this value, and one with several values is a list. The
    key is the feature `__key__`, `key`, `image/filename` or `image/id`, or the number
    of the record. Needs TensorFlow.
    """

    def read(self, fields=None):
        _check_tensorflow(self.path)
        sample = {}
        compressed = self.path.lower().endswith(".gz")
        with _local_copy(self.path) as path:
            compression = "GZIP" if compressed else ""
            records = iter(tf.data.TFRecordDataset(path, compression))
            number = size = 0
            try:
                for record in records:
                    example = tf.train.Example.FromString(record.numpy())
                    sample = _sample(example, number, fields)
                    yield sample
                    number += 1
                    size += len(record.numpy()) + FRAME
                # TensorFlow takes a truncated header of a record as the end of file.
                if size != _size(path, compressed):
                    raise ValueError("it is truncated within a record")
            except tf.errors.NotFoundError as error:
                raise FileNotFoundError(self.path) from error
            except Exception as error:
                last = {"__key__": sample["__key__"]} if sample else {}
                raise ShardError(self, last, str(error)) from error


def _sample(example, number, fields):
    features = example.features.feature
    values = {
        name: _value(feature)
        for name, feature in features.items()
        if fields is None or name in fields or name in KEYS
    }
    key = next((values[name] for name in KEYS if values.get(name)), f"{number:08}")
    if isinstance(key, bytes):
        key = key.decode("utf-8", "surrogateescape")
    wanted = {k: v for k, v in values.items() if fields is None or k in fields}
    return {**wanted, "__key__": str(key)}


def _value(feature):
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    if kind != "bytes_list":
        values = [str(value) for value in values]
    return values[0] if len(values) == 1 else values


def _size(path, compressed):
    """The size of all records with their frames, in bytes."""
    if not compressed:
        return tf.io.gfile.stat(path).length
    size = 0
    with tf.io.gfile.GFile(path, "rb") as file, gzip.open(file) as content:
        while chunk := content.read(2**20):
            size += len(chunk)
    return size


@contextlib.contextmanager
def _local_copy(path):
    """A path that TensorFlow can open: the file itself, or a copy of it."""
    scheme = path.partition("://")[0] if files.is_address(path) else ""
    if scheme in ("", *tf.io.gfile.get_registered_schemes()):
        yield path
        return
    with tempfile.NamedTemporaryFile() as copy:
        with files.open_file(path) as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        yield copy.name


def _check_tensorflow(path):
    if tf is None:
        raise ImportError(
            "TFRecord files need TensorFlow: `pip install tensorflow`, or convert them "
            "to tar files by `python -m keras_cluster_mask.data convert` where it is "
            f"installed. Received: {path}"
        )
