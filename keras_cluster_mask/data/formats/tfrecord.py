"""TFRecord files, in which each `tf.train.Example` is a sample."""

import contextlib
import functools
import itertools

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.base import DamagedShard, Format, key_of

KEYS = ("__key__", "key", "image/filename", "image/id")
NO_EXAMPLE = "a record that is damaged, or not a tf.train.Example"
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
        key, place = None, 0
        with files.open_file(path) as file:
            for number in itertools.count():
                head = file.read(BEFORE)
                if not head:
                    return
                if not _is_intact(head[:8], head[8:]):
                    reason = "the length of a record is damaged, or compressed"
                    raise DamagedShard(path, key, reason)
                size = int.from_bytes(head[:8], "little")
                content, checksum = file.read(size), file.read(AFTER)
                if len(checksum) < AFTER:
                    raise DamagedShard(path, key, "it is truncated within a record")
                key, fields, fault = f"{number:08}", {}, NO_EXAMPLE
                with contextlib.suppress(message.DecodeError):
                    if _is_intact(content, checksum):
                        key, fields = self.parse(content, number, None)
                        fault = None
                yield self.entry(key, place + BEFORE, size, fields, fault)
                place += BEFORE + size + AFTER

    def parse(self, content, number, context):
        entries = _example().FromString(content).features.feature
        fields = {entry.key: _value(entry.value) for entry in entries}
        key = next((fields[name] for name in KEYS if fields.get(name)), f"{number:08}")
        return key_of(key), fields


def _is_intact(content, checksum):
    # Imported here, since only TFRecord files need it.
    import google_crc32c

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
