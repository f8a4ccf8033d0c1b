"""Every sample comes once in an epoch, whoever reads it and wherever it was stopped."""

import itertools

import numpy as np
import pytest

from keras_cluster_mask.data import files
from tests.data.reading import batches, keys, make_dataset, pairs_of, together

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:.*(skipped|is damaged)"),
]

GOOD, EPOCHS = 61, 3
KEYS = [f"{index:02}" for index in range(GOOD)]
PLAIN = [(processes, 24, 1) for processes in (1, 2, 3, 8)]
BLOCKS = [(processes, 32, 4) for processes in (1, 2, 4, 8)]


def make(source, process, batch_size, block_size=1, training=True, **options):
    options |= {"block_size": block_size} if training else {}
    options |= {"process": process, "batch_size": batch_size, "image_size": 4}
    return make_dataset(source, training, **options)


@pytest.fixture
def write_shards(write_tar, encode):
    """Writes samples into shards in turn; some shards may be empty."""
    image = encode(np.zeros((4, 4, 3), "uint8"))

    def write_shards(count, broken=False):
        files = pairs_of([image] * GOOD)
        samples = [files[n : n + 2] for n in range(0, len(files), 2)]
        if broken:
            samples[50:50] = [[("x1.png", image)], [("x2.txt", b"t")]]
            samples[30:30] = [[("x3.png", b"-"), ("x3.txt", b"t")]]
            samples[3:3] = [[("x4.png", b"-"), ("x4.txt", b"t")]]
        shards = []
        for number in range(count):
            members = itertools.chain(*samples[number::count])
            shards.append(write_tar(f"{number:02}.tar", [*members]))
        if broken:
            # The end is damaged, and one sample counts as lost.
            with open(shards[-1], "ab") as file:
                file.write(b"-" * 512)
        return shards

    return write_shards


def check_epochs(stream, num_samples=GOOD, broken=0):
    """Each epoch is all good samples, and another for each broken one."""
    for number in range(EPOCHS):
        epoch = stream[number * num_samples : (number + 1) * num_samples]
        assert {*epoch} == {*KEYS}
        assert len(epoch) == GOOD + broken


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("num_shards", [1, 7])
@pytest.mark.parametrize(("processes", "batch_size", "block_size"), PLAIN + BLOCKS)
def test_processes_read_each_sample_once_per_epoch_also_after_a_stop(
    write_shards, broken, num_shards, processes, batch_size, block_size
):
    shards = write_shards(num_shards, broken)
    count = GOOD + 5 * broken
    steps = -(-EPOCHS * count // batch_size)
    stop = steps // 2
    parts = []
    for index in range(processes):
        arguments = shards, (index, processes), batch_size, block_size
        part = batches(make(*arguments), 0, stop)
        # Another program resumes.
        resumed = make(*arguments)
        assert len(resumed) == count // batch_size
        parts.append(part + batches(resumed, stop, steps))
    check_epochs(together(parts), count, 5 * broken)


@pytest.mark.parametrize(("processes", "batch_size", "block_size"), PLAIN + BLOCKS)
def test_no_sample_is_lost_where_reading_fails_now_and_then(
    write_shards, storage, monkeypatch, processes, batch_size, block_size
):
    monkeypatch.setattr(files, "RETRY_AFTER", (0.0, 0.0, 0.0))
    # Each sample is a request.
    monkeypatch.setattr(files, "MAX_GAP", -1)
    shards = [f"storage://{shard}" for shard in write_shards(3)]
    steps = -(-EPOCHS * GOOD // batch_size)
    datasets = [
        make(shards, (index, processes), batch_size, block_size)
        for index in range(processes)
    ]
    storage.failures = 0.05
    check_epochs(together([batches(dataset, 0, steps) for dataset in datasets]))
    assert not any(dataset.skipped.count for dataset in datasets)
    assert storage.failed > 1


@pytest.mark.parametrize("processes", [1, 3, 8])
def test_processes_take_equal_steps_also_where_most_reading_fails(
    write_shards, storage, monkeypatch, processes
):
    monkeypatch.setattr(files, "RETRY_AFTER", (0.0,))
    shards = [f"storage://{shard}" for shard in write_shards(3)]
    datasets = [make(shards, (index, processes), 24) for index in range(processes)]
    storage.failures = 0.6
    parts = [batches(dataset, 0, 8) for dataset in datasets]
    assert len(together(parts)) == 8 * 24
    assert sum(dataset.skipped.count for dataset in datasets) > 8


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("num_shards", [1, 7])
@pytest.mark.parametrize(
    ("processes", "batch_size"), [(1, 7), (2, 10), (3, 9), (8, 64)]
)
def test_processes_evaluate_each_sample_once(
    write_shards, broken, num_shards, processes, batch_size
):
    shards = write_shards(num_shards, broken)
    read, skipped = [], 0
    for index in range(processes):
        dataset = make(shards, (index, processes), batch_size, training=False)
        read += keys(dataset)
        skipped += dataset.skipped.count
    assert sorted(read) == KEYS
    assert skipped == 5 * broken
