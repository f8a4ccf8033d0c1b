"""TFRecord files, in which each `tf.train.Example` is a sample."""

import functools
import itertools

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message,
    message_factory,
)

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.base import (
    MAX_BYTES,
    DamagedShard,
    Entry,
    Format,
    check_not_compressed,
    is_empty,
)

try:
    import google_crc32c
except ImportError:
    google_crc32c = None

KEYS = ("__key__", "key", "image/filename", "image/id")
# The bytes before a record, its length and a checksum, and its checksum after it.
BEFORE, AFTER = 12, 4
# The protobuf messages of `tf.train.Example`: field names, in order, and types.
MESSAGES = {
    "Example": {"features": ".Features"},
    "Features": {"feature": ".Entry"},
    "Entry": {"key": "TYPE_STRING", "value": ".Feature"},
    "Feature": {"bytes": ".Bytes", "floats": ".Floats", "ints": ".Ints"},
    "Bytes": {"value": "TYPE_BYTES"},
    "Floats": {"value": "TYPE_FLOAT"},
    "Ints": {"value": "TYPE_INT64"},
}
REPEATED = "Features", "Bytes", "Floats", "Ints"


class TFRecord(Format):
    """TFRecord files, whose features are the fields. They are read without TensorFlow.

    A feature with several values becomes a list, and a feature with one value becomes
    this value. The key is the feature `__key__`, `key`, `image/filename` or `image/id`,
    or the record number.
    """

    def scan(self, path):
        if google_crc32c is None:
            raise ImportError(
                "TFRecord files need google-crc32c: `pip install google-crc32c`. "
                f"Received: {path}"
            )
        key = None
        with files.open_file(path) as file:
            for number in itertools.count():
                head = file.read(BEFORE)
                if not head:
                    return
                size = int.from_bytes(head[:8], "little")
                if len(head) < BEFORE or not _is_intact(head[:8], head[8:]):
                    check_not_compressed(path, head)
                    reason = "the length of a record does not match its checksum"
                    raise DamagedShard(path, key, reason)
                place = file.tell()
                content = file.read(size) if size <= MAX_BYTES else b""
                file.seek(place + size)
                checksum = file.read(AFTER)
                if len(checksum) < AFTER:
                    raise DamagedShard(path, key, "it is truncated within a record")
                key, fields, fault = f"{number:08}", {}, None
                if size > MAX_BYTES:
                    fault = "file too large"
                elif not _is_intact(content, checksum):
                    fault = "a record that does not match its checksum"
                else:
                    try:
                        key, fields = self.parse(content, number, None)
                    except message.DecodeError:
                        fault = "a record that is not a tf.train.Example"
                fields = {k: v for k, v in fields.items() if not is_empty(v)}
                yield Entry(key, place, len(content), fields, fault)

    def parse(self, content, number, context):
        entries = _example().FromString(content).features.feature
        fields = {entry.key: _value(entry.value) for entry in entries}
        key = next((fields[name] for name in KEYS if fields.get(name)), f"{number:08}")
        if isinstance(key, bytes):
            key = key.decode("utf-8", "surrogateescape")
        return str(key), fields


def _is_intact(content, checksum):
    crc = google_crc32c.value(content)
    # TFRecord files store masked checksums: rotated, plus a constant.
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == int.from_bytes(checksum, "little")


def _value(feature):
    # A feature has at most one of its fields set.
    values = [value for _, message in feature.ListFields() for value in message.value]
    values = [v if isinstance(v, bytes) else str(v) for v in values]
    return values[0] if len(values) == 1 else values


@functools.cache
def _example():
    """Returns the class `tf.train.Example`, in a pool separate from TensorFlow's."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", syntax="proto3")
    for message_name, fields in MESSAGES.items():
        added = file.message_type.add(name=message_name)
        for number, (name, type) in enumerate(fields.items(), 1):
            field = added.field.add(name=name, number=number)
            if type.startswith("."):
                field.type_name = type
            else:
                field.type = field.Type.Value(type)
            if message_name in REPEATED:
                field.label = field.LABEL_REPEATED
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))
