import functools
import warnings

import numpy as np
import pytest

from keras_cluster_mask.data import SkippedSamples, subset
from keras_cluster_mask.data.samples import Fault
from tests.data.reading import batches, keys, make_dataset, together

pytestmark = pytest.mark.any_backend


make = functools.partial(make_dataset, batch_size=5)


def fault(key, reason="the image cannot be decoded", file="a.tar"):
    return Fault(file, key, reason)


def faults(keys):
    return [(0, int(key), fault(key)) for key in keys]


def test_samples_are_counted_by_reason_and_the_first_twenty_of_each_are_listed():
    skipped = SkippedSamples([("", 200)])
    first = [fault("7"), fault("8", file="b.tar")]
    with pytest.warns(UserWarning, match=r"'7' of a.tar: the image cannot"):
        skipped.report([(0, int(each.key), each) for each in first], [100])
    # Only the first is a warning, and a warning would be an error here.
    skipped.report([(0, 9, fault("9", "no caption"))] * 30, [100])
    assert skipped.by_reason == {"no caption": 30, "the image cannot be decoded": 2}
    assert skipped.count == 32
    assert skipped.take_new() == 32
    assert skipped.take_new() == 0
    assert skipped.examples == {
        "no caption": [fault("9", "no caption")] * 20,
        "the image cannot be decoded": first,
    }
    assert repr(skipped) == (
        "<SkippedSamples count=32, no caption: 30, the image cannot be decoded: 2>"
    )


def test_each_pass_has_a_share_of_its_own():
    skipped = SkippedSamples([("", 20)], max_share=0.1)
    with pytest.warns(UserWarning, match="'0'"):
        skipped.report(faults("01"), [10])
    for broken in ("", "2", "3", ""):
        skipped.report(faults(broken), [10])
    with pytest.raises(ValueError, match=r"'6' .*10 % .*0\.1, 3 broken of 20 "):
        skipped.report(faults("456"), [10])


def test_each_source_has_a_share_of_its_own():
    skipped = SkippedSamples([("a", 100), ("b", 10)], max_share=0.1)
    with pytest.warns(UserWarning, match="'0'"):
        skipped.report(
            [(0, n, fault(f"{n}")) for n in range(9)] + [(1, 100, fault("x"))], [50, 5]
        )
    with pytest.raises(
        ValueError, match=r"10 % of the samples of b are.*2 broken of 10"
    ):
        skipped.report([(1, 101, fault("y"))], [50, 5])


def test_samples_of_one_key_are_not_one_sample():
    skipped = SkippedSamples([("", 20)], max_share=0.1)
    with pytest.raises(ValueError, match=r"'train'.*3 broken of 20"):
        skipped.report([(0, n, fault("train")) for n in range(3)], [10])


# A round of batches reads a sample twice. A source that is small in a mix is read
# several times.
@pytest.mark.filterwarnings("ignore:A sample is broken")
@pytest.mark.parametrize(
    ("share", "total", "reports"),
    [(0.1, 20, [("01", 12), ("0", 12)]), (1.0, 7, [("01234", 6), ("567", 3)])],
)
def test_samples_that_are_read_twice_or_besides_are_not_too_many(share, total, reports):
    skipped = SkippedSamples([("", total)], max_share=share)
    for broken, read in reports:
        skipped.report(faults(broken), [read])
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


BROKEN = {
    "no caption": 1,
    "no image": 2,
    "empty caption": 1,
    "the image cannot be decoded": 2,
}


@pytest.mark.parametrize("training", [False, True])
def test_broken_samples_are_skipped_and_counted_in_each_pass(shard, training):
    dataset = make(shard, training, batch_size=19)
    assert dataset.num_samples == 38
    assert dataset.skipped.count == 0
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            received = keys(dataset, 2)
        (message,) = (str(warning.message) for warning in caught)
        assert f"of {shard}: " in message
        assert {*received} == {f"{index:04}" for index in range(32)}
        assert len(received) == (38 if training else 32)
        assert dataset.skipped.by_reason == BROKEN
        listed = [each for x in dataset.skipped.examples.values() for each in x]
        assert {each.key for each in listed} == {f"x{number}" for number in range(6)}
        assert {each.file for each in listed} == {str(shard)}


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_lost_samples_of_a_damaged_shard_count_as_broken(write_pairs):
    paths = [write_pairs(f"{n}.tar", 100 * n, 100) for n in range(2)]
    # A pair is four blocks.
    paths[0].write_bytes(paths[0].read_bytes()[: 512 * 4 * 90])
    with pytest.warns(UserWarning, match="About 11 samples are lost"):
        dataset = make(paths, max_skipped=0.1)
    assert len(keys(dataset)) == 189
    assert dataset.skipped.by_reason == {"damaged shard": 11}
    with pytest.warns(UserWarning, match="are lost"):
        dataset = make(paths, max_skipped=0.01)
    with pytest.raises(
        ValueError, match=r"1 % of the samples are broken.*damaged shard"
    ):
        keys(dataset)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_each_source_of_a_mix_keeps_its_share(write_pairs):
    broken = [(f"x{n}.{end}", b"-") for n in range(20) for end in ("png", "txt")]
    half = write_pairs("half.tar", 40, 20, broken)
    source = {half: 1, write_pairs("whole.tar", 0, 40): 1}
    # These are a quarter of all samples.
    with pytest.raises(ValueError, match=r"of .*half\.tar are broken.*0\.4"):
        keys(make(source, True, max_skipped=0.4), 16)
    # By chance, one of two processes has more of them.
    make_mix = functools.partial(make, source, True, max_skipped=0.7, batch_size=10)
    read = keys(make_mix(), 16)
    assert sum(key >= "0040" for key in read) == 80
    parts = [batches(make_mix(process=(n, 2)), 0, 16) for n in (0, 1)]
    assert together(parts) == read
    # For evaluation, it is one source.
    evaluated = make(source, True, max_skipped=0.1).for_evaluation()
    with pytest.raises(ValueError, match=r"of the samples are broken.*9 broken of 80"):
        batches(evaluated, 0, 8)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_sources_of_one_name_are_told_apart(noise):
    good = {"image": noise(0), "caption": "a"}
    rows = [good] * 19 + [{**good, "image": b"x"}]
    one, other = (subset(each, range(20)) for each in ([good] * 20, rows))
    assert str(one) == str(other)
    dataset = make({one: 1, other: 1}, True, max_skipped=0.5)
    batches(dataset, 0, 16)
    assert dataset.skipped.count > 0
