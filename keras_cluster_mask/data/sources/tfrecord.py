"""TFRecord files, in which each `tf.train.Example` is a sample."""

import contextlib
import dataclasses
import gzip
import io
import shutil
import struct
import tempfile

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import (
    IMAGE,
    TEXT,
    Entry,
    NoRandomAccess,
    Shard,
    ShardError,
    state_in_file,
    state_of,
)

KEYS = ("__key__", "key", "image/filename", "image/id")
# The length of a record and the two checksums, in bytes.
FRAME = 16
BEFORE = 12
# The head of a record, or of a feature within it, with what is small beside it.
HEAD = 1024
# The checksum of a record, CRC-32C, byte by byte.
POLYNOMIAL = 0x82F63B78
# The wire types of protocol buffers, and the kinds of a feature by their numbers.
VARINT, FIXED_64, CHUNK, FIXED_32 = 0, 1, 2, 5
BYTES, FLOATS, INTS = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class RecordShard(Shard):
    """A TFRecord file, optionally compressed, whose features are the fields.

    A feature with one value is this value, and one with several values is a list. The
    key is the feature `__key__`, `key`, `image/filename` or `image/id`, or the number
    of the record. Reading from start to end needs TensorFlow; reading single samples
    does not, and leaves the checksum of their content unchecked.
    """

    def read(self, fields=None):
        tf = _tensorflow(self.path)
        sample = {}
        compressed = self.path.lower().endswith(".gz")
        with _local_copy(tf, self.path) as path:
            compression = "GZIP" if compressed else ""
            records = iter(tf.data.TFRecordDataset(path, compression))
            number = size = 0
            try:
                for record in records:
                    example = tf.train.Example.FromString(record.numpy())
                    features = example.features.feature
                    values = {
                        name: _value(features[name])
                        for name in features
                        if fields is None or name in fields or name in KEYS
                    }
                    sample = _sample(values, number, fields)
                    yield sample
                    number += 1
                    size += len(record.numpy()) + FRAME
                # TensorFlow takes a truncated header of a record as the end of file.
                if size != _size(tf, path, compressed):
                    raise ValueError("it is truncated within a record")
            except tf.errors.NotFoundError as error:
                raise FileNotFoundError(self.path) from error
            except Exception as error:
                last = {"__key__": sample["__key__"]} if sample else {}
                raise ShardError(self, last, str(error)) from error

    def scan(self):
        if self.path.lower().endswith(".gz"):
            raise NoRandomAccess(self.path)
        last = {}
        try:
            with files.open_file(self.path, buffering=HEAD) as file:
                length = file.seek(0, io.SEEK_END)
                number = place = 0
                while place < length:
                    file.seek(place)
                    size = _record_size(file.read(BEFORE))
                    start, place = place + BEFORE, place + size + FRAME
                    if place > length:
                        raise ValueError("it is truncated within a record")
                    keys, states = {}, {}
                    for name, kind, chunk in _features(file, start, start + size):
                        if name in KEYS:
                            keys[name] = _read_value(file, kind, chunk)
                        states[name] = _state(file, kind, chunk)
                    key = _key(keys, number)
                    last = {"__key__": key}
                    yield Entry(key, start, size, states)
                    number += 1
        except (FileNotFoundError, PermissionError, NoRandomAccess):
            raise
        except Exception as error:
            raise ShardError(self, last, str(error)) from error

    def sample_at(self, content, number, context, fields=None):
        file = io.BytesIO(content)
        values = {
            name: _read_value(file, kind, chunk)
            for name, kind, chunk in _features(file, 0, len(content))
            if fields is None or name in fields or name in KEYS
        }
        return _sample(values, number, fields)


def _sample(values, number, fields):
    key = _key(values, number)
    wanted = {k: v for k, v in values.items() if fields is None or k in fields}
    return {**wanted, "__key__": key}


def _key(values, number):
    key = next((values[name] for name in KEYS if values.get(name)), f"{number:08}")
    if isinstance(key, bytes):
        key = key.decode("utf-8", "surrogateescape")
    return str(key)


def _value(feature):
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    if kind != "bytes_list":
        values = [str(value) for value in values]
    return values[0] if len(values) == 1 else values


def _size(tf, path, compressed):
    """The size of all records with their frames, in bytes."""
    if not compressed:
        return tf.io.gfile.stat(path).length
    size = 0
    with tf.io.gfile.GFile(path, "rb") as file, gzip.open(file) as content:
        while chunk := content.read(2**20):
            size += len(chunk)
    return size


@contextlib.contextmanager
def _local_copy(tf, path):
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


def _tensorflow(path):
    try:
        import tensorflow
    except ImportError as error:
        raise ImportError(
            "TFRecord files need TensorFlow: `pip install tensorflow`, or convert them "
            "to tar files by `python -m keras_cluster_mask.data convert` where it is "
            f"installed. Received: {path}"
        ) from error
    return tensorflow


# === Without TensorFlow ===


def _record_size(head):
    """The size of a record, from the bytes before it."""
    if len(head) < BEFORE:
        raise ValueError("it is truncated within a record")
    size, checksum = struct.unpack("<QI", head)
    crc = 0xFFFFFFFF
    for byte in head[:8]:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (POLYNOMIAL * (crc & 1))
    crc ^= 0xFFFFFFFF
    # TFRecord files rotate checksums and add a constant.
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != checksum:
        raise ValueError("the length of a record does not match its checksum")
    return size


def _features(file, start, end):
    """Each feature of an example: its name, its kind, and the place of its values."""
    for _, _, features in _parts(file, start, end, {1}):
        for _, _, entry in _parts(file, *features, {1}):
            name, kind, values = "", 0, (0, 0)
            for number, _, place in _parts(file, *entry, {1, 2}):
                if number == 1:
                    name = _bytes_at(file, place).decode("utf-8")
                    continue
                for part in _parts(file, *place, {BYTES, FLOATS, INTS}):
                    kind, _, values = part
            yield name, kind, values


def _parts(file, start, end, numbers):
    """The fields of a message: number, wire type, and place or value of each."""
    while start < end:
        file.seek(start)
        tag = _varint(file)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value = _varint(file)
            start = file.tell()
        elif wire_type == CHUNK:
            size = _varint(file)
            value = file.tell(), file.tell() + size
            start = value[1]
        elif wire_type in (FIXED_32, FIXED_64):
            value = file.read(4 if wire_type == FIXED_32 else 8)
            start = file.tell()
        else:
            raise ValueError("a record is not a tf.train.Example")
        if start > end:
            raise ValueError("a record is not a tf.train.Example")
        if number in numbers:
            yield number, wire_type, value


def _varint(file):
    value = shift = 0
    while True:
        byte = file.read(1)
        if not byte or shift > 63:
            raise ValueError("a record is not a tf.train.Example")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7


def _bytes_at(file, place):
    file.seek(place[0])
    return file.read(place[1] - place[0])


def _state(file, kind, chunk):
    """What the values of a feature can be; see `Entry.fields`."""
    if kind != BYTES:
        return state_of(_read_value(file, kind, chunk))
    state = 0
    for position, (_, _, place) in enumerate(_parts(file, *chunk, {1})):
        file.seek(place[0])
        found = state_in_file(file, place[1] - place[0])
        state |= found & (TEXT if position else TEXT | IMAGE)
    return state


def _read_value(file, kind, chunk):
    """The value of a feature with one value, or a list; numbers as text."""
    values = []
    for _, wire_type, value in _parts(file, *chunk, {1}):
        if kind == BYTES:
            values.append(_bytes_at(file, value))
        elif kind == FLOATS:
            content = _bytes_at(file, value) if wire_type == CHUNK else value
            values += [str(x) for x in struct.unpack(f"<{len(content) // 4}f", content)]
        elif wire_type == CHUNK:
            file.seek(value[0])
            while file.tell() < value[1]:
                values.append(_signed(_varint(file)))
        else:
            values.append(_signed(value))
    return values[0] if len(values) == 1 else values


def _signed(value):
    return str(value - 2**64 if value >> 63 else value)
