"""What a batch holds, in which order batches come, and what is read for them."""

import functools
import itertools
import json
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest

from keras_cluster_mask.data import dataset, files, loading
from keras_cluster_mask.data.loading import Captions, Row
from keras_cluster_mask.data.samples import Sample
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
in_fours = functools.partial(make_dataset, batch_size=4)


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
    monkeypatch.setattr(loading, "TOGETHER", (7, 7))
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
    now, read = 0.0, loading.Batches.in_threads
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def slow(*arguments):
        nonlocal now
        for batch in read(*arguments):
            now += 3.0
            yield batch

    monkeypatch.setattr(loading.Batches, "in_threads", slow)
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
    assert "must be read in the process that created it" in queue.get()
    # The pass itself continues.
    assert len(next(iterator)["images"]) == 8
    iterator.close()


# === Captions ===


@pytest.fixture
def several(write_tar, noise):
    """Eight samples of three captions each."""
    members = []
    for index in range(8):
        captions = [f"{index} {word}" for word in ("one", "two", "three")]
        members += [
            (f"{index}.png", noise(index)),
            (f"{index}.json", json.dumps({"captions": captions}).encode()),
        ]
    return write_tar("several.tar", members)


def test_training_draws_a_caption_in_each_epoch_and_evaluation_takes_the_first(several):
    words = ["one", "two", "three"]

    def tokenizer(captions):
        found = [caption.split(" ") for caption in captions]
        return [[int(number), words.index(word)] for number, word in found]

    batches = take(in_fours(several, True, tokenizer=tokenizer), 2 * 30)
    drawn = {}
    for key, (number, word) in zip(
        column(batches, "keys"), column(batches, "token_ids")
    ):
        assert number == int(key)
        drawn.setdefault(key, []).append(int(word))
    assert len(drawn) == 8
    assert all({*found} == {0, 1, 2} for found in drawn.values())
    flat = [word for found in drawn.values() for word in found]
    # Five standard deviations of a binomial distribution of 240 and a third.
    assert all(abs(flat.count(each) - 80) < 37 for each in {*flat})
    batches = take(in_fours(several, tokenizer=tokenizer))
    found = np.concatenate([batch["token_ids"] for batch in batches])
    assert found.tolist() == [[i, 0] for i in range(8)]


def test_half_letters_are_not_changed():
    pair = Sample("x", "1", ("{} \ud800",))
    captions = Captions(None, False, include_captions=True)
    batch = captions.batch([Row(0, 0, pair, None, None, 0)])
    assert batch["captions"].tolist() == [("{} \ud800",)]


@pytest.mark.parametrize("training", [True, False])
def test_all_captions_of_an_image_are_a_tuple(several, training):
    batches = take(in_fours(several, training, include_captions=True), 2)
    for key, captions in zip(column(batches, "keys"), column(batches, "captions")):
        words = ("one", "two", "three")
        assert captions == tuple(f"{key} {word}" for word in words)
    assert batches[0]["captions"].shape == (4,)
    assert in_fours(several, include_captions=True).element_spec["captions"].dtype == (
        "object"
    )


@pytest.mark.parametrize("training", [True, False])
def test_rows_of_a_batch_belong_together(write_pairs, training):
    shard = write_pairs("a.tar", 0, 30)
    dataset = in_fours(shard, training, include_captions=True)
    for batch in take(dataset, 7):
        levels = [int(key) for key in batch["keys"]]
        # The gray level of an image is its key.
        assert (batch["images"] == np.reshape(levels, (-1, 1, 1, 1))).all()
        captions = [(f"no {level}",) for level in levels]
        assert batch["captions"].tolist() == captions
        assert batch["token_ids"].tolist() == [[len(x)] for (x,) in captions]


# === Images ===


@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyError("a bug")])
def test_an_error_of_a_transform_ends_the_run_with_shard_and_key(write_pairs, error):
    def transform(image, generator):
        if image[0, 0, 0] == 5:
            raise error
        return image

    shard = write_pairs("a.tar", 0, 8)
    dataset = in_fours(shard, True, image_transform=transform)
    message = rf"'0005' .*{shard}.*{type(error).__name__}.*{error.args[0]}"
    with pytest.raises(RuntimeError, match=message):
        take(dataset, 2)
    assert dataset.skipped.count == 0


# === Broken samples ===


def broken_tar(write_tar, noise, broken):
    images = [b"broken" if n in broken else noise(n) for n in range(24)]
    return write_tar("broken.tar", pairs_of(images))


def test_training_replaces_a_broken_sample_by_another(write_tar, noise):
    broken = {3, 4, 5, 20}
    expected = take(in_fours(broken_tar(write_tar, noise, {}), True, batch_size=8), 9)
    dataset = in_fours(broken_tar(write_tar, noise, broken), True, batch_size=8)
    for batch, intact in zip(take(dataset, 9), expected, strict=True):
        keys, wanted = batch["keys"].tolist(), intact["keys"].tolist()
        assert {*map(int, keys)}.isdisjoint(broken)
        # The rows that are intact keep their places.
        changed = [int(want) for key, want in zip(keys, wanted) if key != want]
        assert changed == [int(want) for want in wanted if int(want) in broken]


def test_each_sample_that_stands_in_is_cropped_on_its_own(write_tar, noise):
    shard = broken_tar(write_tar, noise, {*range(1, 24)})
    (batch,) = take(in_fours(shard, True, batch_size=24, crop_scale=(0.2, 0.5)), 1)
    assert {*batch["keys"]} == {"00"}
    assert len(np.unique(batch["images"].reshape(24, -1), axis=0)) == 24


def test_a_source_of_broken_samples_is_an_error_in_training(write_tar, noise):
    shard = broken_tar(write_tar, noise, {*range(24)})
    with pytest.raises(RuntimeError, match=r"'\d\d' of .*other samples of the same"):
        take(in_fours(shard, True), 1)


def test_evaluation_leaves_out_broken_samples_and_empty_batches(write_tar, noise):
    shard = broken_tar(write_tar, noise, {2, *range(4, 12)})
    batches = take(in_fours(shard, include_captions=True))
    assert [len(batch["images"]) for batch in batches] == [3, 4, 4, 4]
    good = 0, 1, 3, *range(12, 24)
    assert column(batches, "keys") == [f"{i:02}" for i in good]
    assert all(len(v) == len(b["keys"]) for b in batches for v in b.values())
