import numpy as np
import pytest

from keras_cluster_mask.data.formats import DamagedShard
from keras_cluster_mask.data.formats.tfrecord import NO_EXAMPLE
from tests.data.formats.conftest import record

pytest.importorskip("tensorflow")

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


def test_names_of_shards_may_end_in_their_number(write_records, read_all):
    path = write_records("x.tfrecord-00000-of-00002", RECORDS)
    assert [key for key, _ in read_all(path)[0]] == KEYS


def test_several_values_are_a_list_and_numbers_are_text(write_records, read_all):
    large = 2**63 - 1
    features = {"é": [b"one", b"\xff" * 300], "label": 3, "box": [1, -large], "p": 0.1}
    path = write_records("x.tfrecord", [record(**features, none=[], zero=0)])
    ((key, fields),) = read_all(path)[0]
    assert key == "00000000"
    assert np.float32(fields.pop("p")) == np.float32(0.1)
    assert fields == {
        "é": [b"one", b"\xff" * 300],
        "label": "3",
        "box": ["1", str(-large)],
        "none": [],
        "zero": "0",
    }


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
        assert faults == [("00000001", NO_EXAMPLE)]


def test_a_record_that_is_no_example_costs_one_sample(write_records, read_all):
    path = write_records("x.tfrecord", [RECORDS[0], b"\xff" * 20, b"", RECORDS[2]])
    samples, faults = read_all(path)
    assert [key for key, _ in samples] == ["k0", "00000002", "k2"]
    assert samples[1][1] == {}
    assert faults == [("00000001", NO_EXAMPLE)]
