"""Every sample comes once in an epoch, whoever reads it and wherever it stopped."""

import itertools

import numpy as np
import pytest

from keras_cluster_mask.data import ImageTextBatches

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:Counting the pairs"),
    pytest.mark.filterwarnings("ignore:.*skipped"),
]

GOOD = 61


def make(source, training, process, rows, **options):
    return ImageTextBatches(
        source,
        lambda captions: [[0]] * len(captions),
        4,
        rows * process[1],
        training,
        seed=2,
        shuffle_buffer=10,
        include_keys=True,
        process=process,
        num_threads=1,
        **options,
    )


@pytest.fixture
def write_shards(write_tar, encode):
    """Writes samples into shards, as evenly as can be; some may be empty."""
    image = encode(np.zeros((4, 4, 3), "uint8"))

    def write_shards(count, broken):
        samples = [
            [(f"{index:02}.png", image), (f"{index:02}.txt", b"t")]
            for index in range(GOOD)
        ]
        if broken:
            samples[50:50] = [[("x1.png", image)], [("x2.txt", b"t")]]
            samples[30:30] = [[("x3.png", b"-"), ("x3.txt", b"t")]]
            samples[3:3] = [[("x4.png", b"-"), ("x4.txt", b"t")]]
            samples[3:3] = [samples[0]]
        shards = []
        for number in range(count):
            files = itertools.chain(*samples[number::count])
            shards.append(write_tar(f"{number:02}.tar", [*files]))
        if broken:
            # The mark at its end is missing, but no sample.
            content = shards[-1].read_bytes()
            shards[-1].write_bytes(content.rstrip(b"\0"))
        return shards

    return write_shards


def steps(epoch, count=None):
    """The keys of the batches of an epoch, or of the first of them."""
    return [batch["keys"].tolist() for batch in itertools.islice(epoch, count)]


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 8, 9, 20])
@pytest.mark.parametrize(("processes", "rows"), [(1, 7), (2, 5), (3, 3), (7, 3)])
def test_processes_read_every_sample_once_in_an_epoch_also_after_a_stop(
    write_shards, broken, num_shards, processes, rows
):
    shards = write_shards(num_shards, broken)
    # The key that comes again is a pair if another shard holds it.
    pairs = GOOD + broken * (2 + (num_shards not in (1, 3)))
    read = []
    for index in range(processes):
        first, second = (make(shards, True, (index, processes), rows) for _ in "12")
        part = steps(first) + steps(first, 2)
        # Another program resumes.
        second.position.seek(1, 2)
        read.append(part + steps(second) + steps(second))
        assert first.position.pairs == second.position.pairs == pairs
    # All take the same steps, whatever of a batch was broken.
    assert {len(part) for part in read} == {3 * pairs // (rows * processes)}
    stream = [key for step in zip(*read) for part in step for key in part]
    good = {b"%02d" % index for index in range(GOOD)}
    for epoch in range(2):
        keys = stream[epoch * pairs : epoch * pairs + pairs]
        assert {*keys} == good
        # What is broken is a neighbour's second time.
        assert broken or len(keys) == GOOD


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3, 20])
@pytest.mark.parametrize(("processes", "rows"), [(1, 7), (2, 5), (3, 3), (7, 3)])
def test_processes_evaluate_every_sample_once(
    write_shards, broken, num_shards, processes, rows
):
    shards = write_shards(num_shards, broken)
    again = broken and num_shards not in (1, 3)
    read = []
    for index in range(processes):
        batches = make(shards, False, (index, processes), rows)
        read += [key for keys in steps(batches) for key in keys]
    assert sorted(read) == sorted(
        [b"%02d" % index for index in range(GOOD)] + [b"00"] * again
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_shards", [1, 7])
def test_what_is_given_and_what_is_skipped_are_all_samples(
    write_shards, training, num_shards
):
    batches = make(write_shards(num_shards, True), training, (0, 1), 5)
    for _ in range(2):
        list(batches)
        reasons = dict(batches.skipped.by_reason)
        # No sample, as its end alone is missing.
        assert reasons.pop("damaged shard") == 1
        again = reasons.pop("duplicate key", 0)
        assert reasons == {"no caption": 1, "no image": 1} | {
            "the image does not decode": 2
        }
        assert (again, batches.skipped._read) in ((1, GOOD), (0, GOOD + 1))
