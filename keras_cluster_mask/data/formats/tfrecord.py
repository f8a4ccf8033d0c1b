"""TFRecord files, in which each `tf.train.Example` is a sample."""

import functools

import google_crc32c
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
    NoRandomAccess,
    is_empty,
)

KEYS = ("__key__", "key", "image/filename", "image/id")
# The length of a record and its checksum come before it, and a checksum after it.
BEFORE, AFTER = 12, 4
TRUNCATED = "it is truncated within a record"


class TFRecord(Format):
    """TFRecord files, whose features are the fields. They are read without TensorFlow.

    A feature with one value is this value, and one with several values is a list. The
    key is the feature `__key__`, `key`, `image/filename` or `image/id`, or the number
    of the record.
    """

    def scan(self, path):
        if path.lower().endswith(".gz"):
            raise NoRandomAccess(path, "a compressed TFRecord file")
        key, number = None, 0
        with files.open_file(path) as file:
            while head := file.read(BEFORE):
                size = int.from_bytes(head[:8], "little")
                if len(head) < BEFORE or not _is_intact(head[:8], head[8:]):
                    reason = "the length of a record does not match its checksum"
                    raise DamagedShard(path, key, reason)
                place = file.tell()
                if size > MAX_BYTES:
                    file.seek(place + size)
                    if len(file.read(AFTER)) < AFTER:
                        raise DamagedShard(path, key, TRUNCATED)
                    yield Entry(f"{number:08}", place, 0, (), "file too large")
                    number += 1
                    continue
                content, checksum = file.read(size), file.read(AFTER)
                if len(content) < size or len(checksum) < AFTER:
                    raise DamagedShard(path, key, TRUNCATED)
                key, fields, fault = f"{number:08}", {}, None
                if not _is_intact(content, checksum):
                    fault = "a record that does not match its checksum"
                else:
                    try:
                        key, fields = self.parse(content, number, None)
                    except message.DecodeError:
                        fault = "a record that is not a tf.train.Example"
                names = [name for name in fields if not is_empty(fields[name])]
                yield Entry(key, place, size, names, fault)
                number += 1

    def parse(self, content, number, context):
        features = _example().FromString(content).features.feature
        fields = {name: _value(features[name]) for name in features}
        key = next((fields[name] for name in KEYS if fields.get(name)), f"{number:08}")
        if isinstance(key, bytes):
            key = key.decode("utf-8", "surrogateescape")
        return str(key), fields


def _is_intact(content, checksum):
    crc = google_crc32c.value(content)
    # TFRecord files rotate checksums and add a constant.
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == int.from_bytes(checksum, "little")


def _value(feature):
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    if kind != "bytes_list":
        values = [str(value) for value in values]
    return values[0] if len(values) == 1 else values


@functools.cache
def _example():
    """The message `tf.train.Example`, in a pool of its own beside TensorFlow's."""
    package = "keras_cluster_mask"
    file = descriptor_pb2.FileDescriptorProto(
        name="keras_cluster_mask_example.proto", package=package, syntax="proto3"
    )

    def field(message, name, number, kind, repeated=False):
        added = message.field.add(name=name, number=number, label=3 if repeated else 1)
        if isinstance(kind, int):
            added.type = kind
        else:
            added.type, added.type_name = added.TYPE_MESSAGE, f".{package}.{kind}"
        return added

    types = descriptor_pb2.FieldDescriptorProto
    feature = descriptor_pb2.DescriptorProto(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(
        [
            ("bytes_list", types.TYPE_BYTES),
            ("float_list", types.TYPE_FLOAT),
            ("int64_list", types.TYPE_INT64),
        ],
        1,
    ):
        values = file.message_type.add(name=name)
        field(values, "value", 1, kind, repeated=True)
        field(feature, name, number, name).oneof_index = 0
    file.message_type.append(feature)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    field(entry, "key", 1, types.TYPE_STRING)
    field(entry, "value", 2, "Feature")
    field(features, "feature", 1, "Features.FeatureEntry", repeated=True)
    field(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName(f"{package}.Example")
    )
