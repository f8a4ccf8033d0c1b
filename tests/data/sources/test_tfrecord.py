import sys

import pytest

from keras_cluster_mask.data.sources import ShardError, find_shards, read_samples

tf = pytest.importorskip("tensorflow")

pytestmark = pytest.mark.any_backend

# Before and after the content of a record: its length, and checksums of both.
BEFORE, AFTER = 12, 4


def record(**features):
    """An example of bytes, ints and floats, or lists of them."""

    def feature(value):
        values = value if isinstance(value, list) else [value]
        if values and isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        if values and isinstance(values[0], float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=values))
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    made = {name: feature(value) for name, value in features.items()}
    example = tf.train.Example(features=tf.train.Features(feature=made))
    return example.SerializeToString()


@pytest.fixture
def write_records(tmp_path):
    def write_records(name, records):
        path = tmp_path / name
        options = "GZIP" if name.endswith(".gz") else None
        with tf.io.TFRecordWriter(str(path), options) as writer:
            for each in records:
                writer.write(each)
        return path

    return write_records


RECORDS = [
    record(
        **{"image/encoded": b"%d" % i, "caption": b"no %d" % i, "__key__": b"k%d" % i}
    )
    for i in range(5)
]
SAMPLES = [
    {"__key__": f"k{i}", "image/encoded": b"%d" % i, "caption": b"no %d" % i}
    for i in range(5)
]


@pytest.mark.parametrize("name", ["x.tfrecord", "x.tfrecord.gz"])
def test_an_example_is_a_sample_and_its_features_are_the_fields(write_records, name):
    path = write_records(name, RECORDS)
    assert list(read_samples(path, {"image/encoded", "caption"})) == SAMPLES


def test_only_the_features_asked_for_are_given(write_records):
    path = write_records("x.tfrecord", RECORDS[:2])
    expected = [{"__key__": f"k{i}", "caption": b"no %d" % i} for i in range(2)]
    assert list(read_samples(path, {"caption"})) == expected


def test_several_values_are_a_list_and_numbers_are_text(write_records):
    features = {"caption": [b"one", b"two"], "label": 3, "box": [1, 2], "p": 0.5}
    path = write_records("x.tfrecord", [record(**features, none=[])])
    (sample,) = read_samples(path)
    assert sample == {
        "__key__": "00000000",
        "caption": [b"one", b"two"],
        "label": "3",
        "box": ["1", "2"],
        "p": "0.5",
        "none": [],
    }


def test_the_key_is_a_feature_or_the_number_of_the_record(write_records):
    records = [
        record(**{"__key__": b"a", "image/filename": b"no.jpg"}),
        record(**{"image/filename": b"b.jpg", "image/id": 7}),
        record(**{"image/id": 7}),
        record(**{"__key__": b"", "caption": b"c"}),
        record(**{"key": b"\xff"}),
    ]
    path = write_records("x.tfrecord", records)
    assert [sample["__key__"] for sample in read_samples(path)] == [
        "a",
        "b.jpg",
        "7",
        "00000003",
        "\udcff",
    ]


@pytest.mark.parametrize("part", ["length", "content", "checksum"])
def test_a_flipped_bit_ends_a_file_with_the_last_key(write_records, part):
    path = write_records("x.tfrecord", RECORDS)
    start = 2 * (BEFORE + len(RECORDS[0]) + AFTER)
    place = {"length": 1, "content": BEFORE + 9, "checksum": BEFORE + len(RECORDS[0])}
    content = bytearray(path.read_bytes())
    content[start + place[part]] ^= 16
    path.write_bytes(content)
    samples = read_samples(path, {"image/encoded", "caption"})
    assert [next(samples) for _ in range(2)] == SAMPLES[:2]
    with pytest.raises(ShardError, match=r"x\.tfrecord is damaged .* 'k1'") as error:
        next(samples)
    assert error.value.last_key == "k1"


@pytest.mark.parametrize("name", ["x.tfrecord", "x.tfrecord.gz"])
def test_a_file_that_breaks_off_within_a_record_is_damaged(write_records, name):
    path = write_records(name, RECORDS)
    content = path.read_bytes()
    size = BEFORE + len(RECORDS[0]) + AFTER
    for cut in [*range(1, BEFORE + 2, 4), *range(size, len(content), 23)]:
        if name.endswith("d") and cut % size == 0:
            continue  # Nothing tells that more was there.
        path.write_bytes(content[:cut])
        with pytest.raises(ShardError, match="is damaged"):
            list(read_samples(path))


def test_a_missing_file_is_not_a_damaged_one(tmp_path, write_records):
    with pytest.raises(FileNotFoundError, match=r"x\.tfrecord"):
        list(read_samples(tmp_path / "x.tfrecord"))
    path = write_records("x.tfrecord", RECORDS)
    (shard,) = find_shards(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.tfrecord"):
        list(shard.read())


def test_what_is_no_example_is_damage(write_records):
    path = write_records("x.tfrecord", [RECORDS[0], b"\xff" * 20])
    samples = read_samples(path)
    assert next(samples)["__key__"] == "k0"
    with pytest.raises(ShardError, match="k0"):
        next(samples)


def test_a_file_at_an_address_is_read(write_records):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.pipe(
        "/records/x.tfrecord", write_records("y.tfrecord", RECORDS).read_bytes()
    )
    address = "memory://records/x.tfrecord"
    assert len(list(read_samples(address))) == 5
    system.rm("/records", recursive=True)
    with pytest.raises(FileNotFoundError):
        list(read_samples(address))


def test_tensorflow_is_asked_for_if_it_is_missing(write_records, monkeypatch):
    path = write_records("x.tfrecord", RECORDS)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r"need TensorFlow.*x\.tfrecord"):
        list(read_samples(path))
