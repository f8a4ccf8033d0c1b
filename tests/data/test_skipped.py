import functools
import warnings

import numpy as np
import pytest

from keras_cluster_mask.data import SkippedSamples
from keras_cluster_mask.data.samples import Fault
from tests.data.reading import keys, make_dataset

pytestmark = pytest.mark.any_backend


make = functools.partial(make_dataset, batch_size=5)


def fault(key, reason="the image does not decode", shard="a.tar"):
    return Fault(shard, key, reason)


class Index:
    """What the index of two shards left out."""

    faults = {"no image": 25, "no caption": 1}

    def examples(self, count):
        yield fault("silent", "no caption")
        yield from (fault(f"{n}", "no image", "b.tar") for n in range(min(count, 25)))


def test_samples_are_counted_by_reason_and_the_first_twenty_of_each_are_listed():
    skipped = SkippedSamples([Index()])
    with pytest.warns(UserWarning, match=r"'7' of a.tar: the image does not"):
        skipped.report([fault("7"), fault("8", shard="b.tar")], 100, 200)
    # Only the first is a warning, and a warning would be an error here.
    skipped.report([fault("9", "no caption")] * 30, 100, 200)
    assert skipped.by_reason == {
        "no caption": 31,
        "no image": 25,
        "the image does not decode": 2,
    }
    assert skipped.count == 58
    assert skipped.take_new() == 32
    assert skipped.take_new() == 0
    assert skipped.examples == {
        "no caption": [fault("silent", "no caption"), *[fault("9", "no caption")] * 19],
        "no image": [fault(f"{n}", "no image", "b.tar") for n in range(20)],
        "the image does not decode": [fault("7"), fault("8", shard="b.tar")],
    }
    assert repr(skipped) == (
        "<SkippedSamples count=58, no caption: 31, no image: 25, "
        "the image does not decode: 2>"
    )


def test_each_pass_has_a_share_of_its_own():
    skipped = SkippedSamples(max_share=0.1)
    with pytest.warns(UserWarning, match="'0'"):
        skipped.report([fault("0"), fault("1")], 10, 20)
    for broken in ("", "2", "3", ""):
        skipped.report([*map(fault, broken)], 10, 20)
    with pytest.raises(ValueError, match=r"'4' .*10 % .*0\.1, 3 broken of 20 "):
        skipped.report([fault("4"), fault("5"), fault("6")], 10, 20)


# A round of batches reads a sample twice. If most samples of a pass are lost, the pass
# reads others besides.
@pytest.mark.filterwarnings("ignore:A sample is broken")
@pytest.mark.parametrize(
    ("share", "total", "reports"),
    [(0.1, 20, [("01", 12), ("0", 12)]), (1.0, 7, [("01234", 6), ("567", 3)])],
)
def test_samples_that_are_read_twice_or_besides_are_not_too_many(share, total, reports):
    skipped = SkippedSamples(max_share=share)
    for broken, read in reports:
        skipped.report([*map(fault, broken)], read, total)
    assert skipped.count == sum(len(broken) for broken, _ in reports)


# === Of a dataset ===


@pytest.fixture
def shard(write_pairs, encode):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), "uint8")
    jpeg = encode(image, "JPEG")
    broken = [
        *[("x0.jpg", jpeg[: len(jpeg) // 2]), ("x0.txt", b"half a JPEG")],
        *[("x1.jpg", b"garbage"), ("x1.txt", b"not an image")],
        *[("x2.jpg", jpeg), ("x3.txt", b"no image")],
        *[("x4.jpg", jpeg), ("x4.txt", b" \n")],
        *[("x5.jpg", b""), ("x5.txt", b"an image of no bytes")],
    ]
    return write_pairs("x.tar", 0, 32, broken)


# Found by the index, and when samples are read.
STRUCTURAL = {"no caption": 1, "no image": 2}
READ = {"empty caption": 1, "the image does not decode": 2}


@pytest.mark.parametrize("training", [False, True])
def test_broken_samples_are_skipped_and_counted_in_each_pass(shard, training):
    dataset = make(shard, training)
    assert dataset.num_samples == 35
    assert dataset.skipped.by_reason == STRUCTURAL
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            received = keys(dataset, 7)
        (message,) = (str(warning.message) for warning in caught)
        assert f"of {shard}: " in message
        assert {*received} == {f"{index:04}" for index in range(32)}
        assert len(received) == (35 if training else 32)
        assert dataset.skipped.by_reason == STRUCTURAL | READ
        listed = [each for x in dataset.skipped.examples.values() for each in x]
        assert {each.key for each in listed} == {f"x{number}" for number in range(6)}
        assert {each.shard for each in listed} == {str(shard)}
