import collections
import functools
import warnings

import numpy as np
import pytest

from keras_cluster_mask.data import Sampling, SkippedSamples
from keras_cluster_mask.data.samples import Fault
from tests.data.reading import batches, keys, make_dataset, together

pytestmark = pytest.mark.any_backend


make = functools.partial(make_dataset, batch_size=5)


def fault(key, reason="the image does not decode", shard="a.tar"):
    return Fault(shard, key, reason)


class Index:
    """What the index of two shards left out."""

    faults = collections.Counter({"no image": 25, "no caption": 1})

    def examples(self, count):
        yield fault("silent", "no caption")
        yield from (fault(f"{n}", "no image", "b.tar") for n in range(min(count, 25)))


def test_samples_are_counted_by_reason_and_the_first_twenty_of_each_are_listed():
    skipped = SkippedSamples([Index()], lengths=[200])
    with pytest.warns(UserWarning, match=r"'7' of a.tar: the image does not"):
        skipped.report([(0, fault("7")), (0, fault("8", shard="b.tar"))])
    # Only the first is a warning, and a warning would be an error here.
    skipped.report([(0, fault("9", "no caption"))] * 30)
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


def found(broken, count, source=0):
    """What a batch reports of `count` samples of a source."""
    return [(source, key and fault(key)) for key in [*broken, *[None] * count][:count]]


def test_each_pass_over_a_source_has_a_share_of_its_own():
    skipped = SkippedSamples([Index()] * 2, 0.1, ["`first`", "`second`"], [20, 10])
    with pytest.warns(UserWarning, match="'0'"):
        skipped.report(found("01", 12))
    # A pass that begins within an epoch may read a sample twice, and a batch may hold
    # several passes over a short source.
    for broken in ("0", "2", "3", ""):
        skipped.report(found(broken, 12) + found("a", 10, 1) + found("b", 10, 1))
    with pytest.raises(ValueError, match=r"'d' .*10 % .* `second` .* 2 broken of 10 "):
        skipped.report(found("", 10, 1) + found("cd", 10, 1))
    message = r"'6' .*10 % .* `first` .*0\.1, 3 broken of 20 samples, .*not decode: 8"
    with pytest.raises(ValueError, match=message):
        skipped.report(found("456", 8))


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


# Each sample is 2,048 bytes.
@pytest.mark.parametrize(
    ("damage", "others", "intact", "lost", "reason"),
    [
        (lambda x: x[:41_000], 0, 19, 19, "a shard of 38 samples"),
        (lambda x: x[:42_500], 2, 420, 180, "a shard of 200 samples"),
        (lambda x: b"", 2, 400, 200, "a shard of 200 samples"),
        (lambda x: x * 5, 0, 200, 800, "the size of the rest"),
        (lambda x: x[:368_640] + b"-" * 40_960, 0, 180, 20, "the size of the rest"),
    ],
)
def test_samples_that_damage_has_lost_count_as_broken(
    write_pairs, damage, others, intact, lost, reason
):
    source = [write_pairs(f"{n}.tar", 0, 200) for n in range(others + 1)]
    source[0].write_bytes(damage(source[0].read_bytes()))
    message = rf"/0\.tar is damaged .* samples are counted as lost, .*{reason}"
    with pytest.raises(ValueError, match=rf"{message}.*`max_skipped`"):
        make(source, max_skipped=0.05)
    with pytest.warns(UserWarning, match=rf"{message}.*left out"):
        dataset = make(source, max_skipped=0.9)
    counts = len(keys(dataset)), dataset.skipped.count
    # The end of a tar is as large as five samples.
    assert counts == pytest.approx((intact, lost), abs=1, rel=0.04)


# Found by the index, and when samples are read.
@pytest.mark.filterwarnings("ignore:.*skipped", "ignore:.*They are left out")
@pytest.mark.parametrize("ends", [("png",), ("png", "txt")])
def test_each_source_of_a_mix_has_a_share_of_its_own(write_pairs, ends):
    broken = [(f"x{n}.{end}", b"-") for n in range(20) for end in ends]
    half = write_pairs("half.tar", 40, 20, broken)
    source = {half: 1, write_pairs("whole.tar", 0, 40): 1}
    # These are a quarter of all samples.
    with pytest.raises(ValueError, match=r"`source\[.*half\.tar.*\]` are broken.*0\.4"):
        keys(make(source, True, max_skipped=0.4), 16)
    # By chance, one of two processes has more of them.
    make_mix = functools.partial(make, source, True, max_skipped=0.7, batch_size=10)
    read = keys(make_mix(), 16)
    assert sum(key >= "0040" for key in read) == 80
    parts = [batches(make_mix(process=(n, 2)), 0, 16) for n in (0, 1)]
    assert together(parts) == read


def test_a_pass_is_as_long_as_the_samples_that_are_chosen(write_pairs):
    shard = write_pairs("a.tar", 0, 40, [("x.png", b"-"), ("x.txt", b"t")])
    sampling = Sampling(["x", "0001", "0002", "0003", "0004"])
    with pytest.raises(ValueError, match="1 broken of 5 samples"):
        keys(make(shard, True, max_skipped=0.1, sampling=sampling), 1)


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
        assert {each.file for each in listed} == {str(shard)}
