import numpy as np
import pytest

from keras_cluster_mask.data.formats import DamagedShard, tfrecord
from tests.data.formats.conftest import record

tf = pytest.importorskip("tensorflow")

pytestmark = pytest.mark.any_backend

# Before and after the content of a record: its length, and checksums of both.
BEFORE, AFTER = 12, 4


RECORDS = [
    record(
        **{"image/encoded": b"%d" % i, "caption": b"no %d" % i, "__key__": b"k%d" % i}
    )
    for i in range(5)
]
KEYS = [f"k{i}" for i in range(5)]


def test_several_values_are_a_list_and_numbers_are_text(write_records, read_all):
    features = {"caption": [b"one", b"two"], "label": 3, "box": [1, -2], "p": 0.5}
    path = write_records("x.tfrecord", [record(**features, none=[], zero=0)])
    ((key, fields),) = read_all(path)[0]
    assert key == "00000000"
    assert fields == {
        "caption": [b"one", b"two"],
        "label": "3",
        "box": ["1", "-2"],
        "p": "0.5",
        "none": [],
        "zero": "0",
    }


def test_random_examples_are_read_as_tensorflow_reads_them(write_records, read_all):
    generator = np.random.default_rng(0)
    kinds = (
        lambda n: [generator.bytes(int(generator.integers(300))) for _ in range(n)],
        lambda n: generator.integers(-(2**63), 2**63 - 1, n).tolist(),
        lambda n: generator.normal(size=n).astype("float32").tolist(),
    )
    records = [
        record(
            **{
                f"{name}/é{n}": kinds[int(generator.integers(3))](n)
                for name in range(5)
                for n in (0, 1, 3)
            }
        )
        for _ in range(50)
    ]
    samples, _ = read_all(write_records("x.tfrecord", records))
    assert len(samples) == 50
    for (_, fields), content in zip(samples, records):
        features = tf.train.Example.FromString(content).features.feature
        assert fields.keys() == features.keys()
        for name, found in fields.items():
            kind = features[name].WhichOneof("kind")
            expected = list(getattr(features[name], kind).value) if kind else []
            found = found if isinstance(found, list) else [found]
            if kind == "int64_list":
                found = [int(each) for each in found]
            elif kind == "float_list":
                found = [float(each) for each in found]
            assert found == expected


def test_the_key_is_a_feature_or_the_number_of_the_record(write_records, read_all):
    records = [
        record(**{"__key__": b"a", "image/filename": b"no.jpg"}),
        record(**{"image/filename": b"b.jpg", "image/id": 7}),
        record(**{"image/id": 7}),
        record(**{"__key__": b"", "caption": b"c"}),
        record(**{"key": b"\xff"}),
    ]
    samples, _ = read_all(write_records("x.tfrecord", records))
    keys = ["a", "b.jpg", "7", "00000003", "\udcff"]
    assert [key for key, _ in samples] == keys


@pytest.mark.parametrize("value", [[b"a", b"b"], [], [1, 2]])
def test_a_key_of_several_values_is_no_damage(write_records, read_all, value):
    path = write_records("x.tfrecord", [record(key=value, caption=b"c")])
    ((key, fields),) = read_all(path)[0]
    assert isinstance(key, str)
    assert fields["caption"] == b"c"


def test_a_truncated_file_gives_its_intact_samples(write_records, scan):
    path = write_records("x.tfrecord", RECORDS)
    content = path.read_bytes()
    size = BEFORE + len(RECORDS[0]) + AFTER
    assert len(content) == 5 * size
    for cut in [*range(1, BEFORE + 2, 4), *range(size + 1, len(content), 23)]:
        path.write_bytes(content[:cut])
        keys = []
        # The end of a whole record looks like the end of a file.
        if cut % size == 0:
            continue
        with pytest.raises(DamagedShard, match=r"x\.tfrecord is damaged") as error:
            keys.extend(scan(path))
        assert keys == KEYS[: cut // size]
        assert error.value.args[1] == (keys[-1] if keys else None)


def test_a_flipped_bit_costs_one_sample_or_ends_the_file(write_records, read_all, scan):
    path = write_records("x.tfrecord", RECORDS[:3])
    whole = path.read_bytes()
    size = BEFORE + len(RECORDS[0]) + AFTER
    expected, _ = read_all(path)
    assert len(expected) == 3
    for place in range(size):
        content = bytearray(whole)
        content[size + place] ^= 16
        path.write_bytes(content)
        if place < BEFORE:
            # Where the next record starts is unknown.
            with pytest.raises(DamagedShard, match="after the sample 'k0': the length"):
                list(scan(path))
            continue
        samples, faults = read_all(path)
        assert samples == [expected[0], expected[2]]
        reason = "a record that does not match its checksum"
        assert faults == [("00000001", reason)]


def test_a_record_that_is_no_example_costs_one_sample(write_records, read_all):
    path = write_records("x.tfrecord", [RECORDS[0], b"\xff" * 20, b"", RECORDS[2]])
    samples, faults = read_all(path)
    assert [key for key, _ in samples] == ["k0", "00000002", "k2"]
    assert samples[1][1] == {}
    assert faults == [("00000001", "a record that is not a tf.train.Example")]


def test_a_record_that_is_too_large_is_a_fault(write_records, read_all, monkeypatch):
    monkeypatch.setattr(tfrecord, "MAX_BYTES", len(RECORDS[0]))
    records = [RECORDS[0], record(**{"__key__": b"large", "image": b"x" * 99})]
    samples, faults = read_all(write_records("x.tfrecord", [*records, RECORDS[2]]))
    assert [key for key, _ in samples] == ["k0", "k2"]
    assert [fault for _, fault in faults] == ["file too large"]
