"""Batches as a stream: its length, its start, and what it reads."""

import functools
import itertools
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest

from keras_cluster_mask.data import batches, dataset, files
from tests.data.reading import (
    TOKENIZER,
    Counted,
    assert_same,
    column,
    make_dataset,
    pairs_of,
    take,
    take_from_tensorflow,
)

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:.*skipped"),
]

make = functools.partial(
    make_dataset, tokenizer=TOKENIZER, include_captions=True, seed=3
)


def keys(batches):
    return column(batches, "keys")


@pytest.fixture
def shards(write_pairs, write_tar, encode):
    """100 samples; some show their crop, and some are broken."""
    members = []
    for index in range(30):
        image = np.random.default_rng(index).integers(0, 256, (20, 30, 4), "uint8")
        content = b"broken" if index % 10 == 5 else encode(image)
        members += [(f"{index}.png", content), (f"{index}.txt", b"no %d" % index)]
    clear = write_tar("c.tar", members)
    return [write_pairs("a.tar", 0, 50), write_pairs("b.tar", 50, 20), clear]


# === The same batches ===


@pytest.mark.parametrize("options", [{}, {"block_size": 2}])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_training_batches_do_not_depend_on_the_number_of_processes(
    shards, processes, options
):
    options = {"batch_size": 16, **options}
    expected = take(make(shards, True, **options), 14)
    parts = [
        take(make(shards, True, process=(index, processes), **options), 14)
        for index in range(processes)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
        for batch in zip(*parts)
    ]
    assert_same(joined, expected)
    # Something of everything was compared.
    assert {len(key) for key in keys(expected)} == {1, 2, 4}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("data_format")
def test_tensorflow_numbers_and_torch_read_the_same_batches(shards, training):
    pytest.importorskip("tensorflow")
    data = pytest.importorskip("torch.utils.data")
    names = [f"no {index}" for index in range(200)]
    dataset = make(shards, training, label_key="txt", class_names=names)
    dataset.start = 2
    expected = take(dataset, 10)
    spec = dataset.element_spec
    assert {*spec} == {"captions", "images", "keys", "labels", "token_ids"}
    for name, (shape, dtype) in spec.items():
        values = expected[0][name]
        assert shape in (values.shape, (None, *values.shape[1:]))
        assert values.dtype == ("object" if dtype == "string" else dtype)
    without = [{k: v for k, v in x.items() if k != "captions"} for x in expected]
    assert_same(take_from_tensorflow(dataset, 10), without)
    assert_same([dataset[number] for number in range(10)], expected)
    loader = data.DataLoader(
        dataset, batch_size=None, collate_fn=lambda x: x, num_workers=2
    )
    assert_same(take(loader, 10), expected)
    for number in (-1, *(() if training else (11,))):
        with pytest.raises(IndexError):
            dataset[number]


def test_batches_do_not_depend_on_how_much_is_read_together(shards, monkeypatch):
    expected = take(make(shards, True, batch_size=40), 6)
    monkeypatch.setattr(batches, "TOGETHER", (7, 7))
    monkeypatch.setattr(files, "MAX_GAP", -1)
    assert_same(take(make(shards, True, batch_size=40), 6), expected)


# === Length and start ===


@pytest.mark.parametrize("training", [True, False])
def test_each_iteration_begins_with_the_start_of_the_stream(shards, training):
    expected = take(make(shards, training), 13)
    dataset = make(shards, training)
    assert dataset.start == 0
    for start in (0, 7, 12, 0):
        dataset.start = start
        assert_same(take(dataset, 13 - start), expected[start:])
        if not training:
            assert len(dataset) == len([*dataset]) == len(expected) - start
            assert dataset.num_images == 100 - 8 * start


def test_the_description_tells_other_data_and_other_orders(shards):
    def describe(source=shards, **options):
        return make(source, True, **options).description

    assert describe() == describe()
    assert describe(num_workers=2, process=(1, 2)) == describe()
    others = [
        describe(shards[:2]),
        describe(seed=4),
        describe(batch_size=16),
        describe(block_size=2),
        describe(image_keys=["png", "jpg"]),
        describe({str(shards[0]): 1, str(shards[1]): 2}),
    ]
    for number, other in enumerate(others):
        assert other not in [describe(), *others[:number]]


# === What is read ===


def test_a_process_reads_no_more_than_its_share(write_tar, noise, storage):
    processes, rows, block_size = 64, 16, 8
    files = pairs_of([noise(0)] * (processes * rows * 12 // 8))
    shards = [write_tar(f"{number}.tar", files) for number in range(8)]
    dataset = make(
        [f"storage://{shard}" for shard in shards],
        True,
        batch_size=processes * rows,
        block_size=block_size,
        process=(7, processes),
    )
    storage.requests.clear()
    steps = len(dataset)
    assert len(take(dataset, steps)) == steps
    read = sum(last - first for _, first, last in storage.requests)
    # Two batches are read ahead.
    share = sum(map(os.path.getsize, shards)) / processes * (steps + 2) / steps
    assert 0.8 * share < read <= 1.1 * share
    # A run is one request.
    assert len(storage.requests) <= 1.2 * (steps + 2) * rows / block_size


@pytest.fixture
def two_processors(monkeypatch):
    monkeypatch.setattr(dataset, "num_processors", lambda: 2)


@pytest.mark.parametrize("training", [True, False])
def test_resuming_reads_no_sample_before_the_position(noise, two_processors, training):
    source = Counted([{"image": noise(0), "caption": "no 1"}] * 1000)
    dataset = make(source, training)
    start = len(dataset) * 9 // 10
    before = {*map(int, keys(take(dataset, start)))}
    assert len(before) == 8 * start > 880
    source.read.clear()
    dataset.start = start
    received = keys(take(dataset, 3))
    assert len({*received}) == 24
    assert {*map(int, received)} <= {*source.read}
    assert not {*source.read} & before


def settle(count):
    """Waits until a count does not change."""
    before = -1
    while count() != before:
        before = count()
        time.sleep(0.3)


def test_the_seconds_of_waiting_for_batches_add_up(shards, monkeypatch):
    now, read = 0.0, batches.Batches.in_threads
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def slow(*arguments):
        nonlocal now
        for batch in read(*arguments):
            now += 3.0
            yield batch

    monkeypatch.setattr(batches.Batches, "in_threads", slow)
    dataset = make(shards, True)
    for passes in (1, 2):
        for _ in itertools.islice(dataset, 4):
            now += 1.0
        assert dataset.waited == 12.0 * passes


def test_threads_end_with_an_iterator_and_with_an_error_that_is_kept(shards):
    take(make(shards, True), 2)
    settle(threading.active_count)
    before = threading.active_count()
    for _ in range(5):
        take(make(shards, True), 2)
    with pytest.raises(ValueError, match="max_skipped"):
        [*make(shards, max_skipped=0.01)]
    settle(threading.active_count)
    assert threading.active_count() <= before


def test_a_pass_cannot_be_read_in_a_fork(shards):
    iterator = iter(make(shards, True))
    next(iterator)

    def read(queue):
        try:
            queue.put(str(len(next(iterator)["images"])))
        except Exception as error:
            queue.put(repr(error))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=read, args=(queue,), daemon=True)
    process.start()
    process.join(20)
    is_alive = process.is_alive()
    process.kill()
    assert not is_alive
    assert "must be read in the process that started it" in queue.get()
    # The pass itself continues.
    assert len(next(iterator)["images"]) == 8
    iterator.close()
