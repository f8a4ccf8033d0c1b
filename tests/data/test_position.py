"""A pipeline resumes from any place of any epoch."""

import numpy as np
import pytest

from .test_dataset import assert_same, batches, make

tf = pytest.importorskip("tensorflow")


pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:Counting the pairs"),
]


@pytest.fixture
def source(write_pairs):
    broken = [("bad.png", b"no image"), ("bad.txt", b"bad")]
    return [write_pairs("a.tar", 0, 70, broken=broken), write_pairs("b.tar", 70, 30)]


def dataset(source, **options):
    return make(source, True, seed=3, shuffle_buffer=20, **options)


@pytest.mark.filterwarnings("ignore:.*does not decode")
def test_any_epoch_is_read_without_those_before(source):
    one, other = dataset(source), dataset(source)
    epochs = [batches(one) for _ in range(3)]
    other.position.seek(2)
    assert_same(batches(other), epochs[2])
    other.position.seek(1)
    assert_same(batches(other), epochs[1])
    # Then on with the next.
    assert_same(batches(other), epochs[2])


@pytest.mark.parametrize("global_seed", [0, 1])
def test_the_order_does_not_depend_on_the_global_seed(write_pairs, global_seed):
    import keras

    shard = write_pairs("a.tar", 0, 40)
    expected = batches(dataset(shard))
    keras.utils.set_random_seed(global_seed)
    assert_same(batches(dataset(shard)), expected)


@pytest.mark.filterwarnings("ignore:.*does not decode")
@pytest.mark.parametrize("done", [1, 5, 12])
def test_the_rest_of_an_epoch_is_what_was_not_read_of_it(source, done):
    one, other = dataset(source), dataset(source)
    batches(one)
    whole = batches(one)
    assert len(whole) == 101 * 2 // 8 - 101 // 8 == 13
    other.position.seek(1, done)
    assert_same(batches(other), whole[done:])


@pytest.mark.parametrize("batch_size", [8, 10, 60])
def test_what_is_left_of_an_epoch_opens_the_next(write_pairs, batch_size):
    source = [write_pairs("a.tar", 0, 70), write_pairs("b.tar", 70, 30)]
    data = dataset(source, batch_size=batch_size)
    epochs = [batches(data) for _ in range(6)]
    read = [key for epoch in epochs for batch in epoch for key in batch["keys"]]
    assert len(read) == 600
    for start in range(0, 600, 100):
        assert len(set(read[start : start + 100])) == 100


@pytest.mark.filterwarnings("ignore:.*does not decode")
def test_what_is_left_of_an_epoch_is_found_without_having_read_it(source):
    one, other = dataset(source), dataset(source)
    epochs = [batches(one) for _ in range(3)]
    # Given up in the middle, so that nothing is left over of it.
    next(iter(other))
    assert_same(batches(other), epochs[1])
    assert_same(batches(other), epochs[2])


def test_repeating_leaves_nothing_out(write_pairs):
    data = dataset(write_pairs("a.tar", 0, 30), batch_size=8).repeat().take(15)
    read = [key for batch in batches(data) for key in batch["keys"]]
    assert all(len(set(read[start : start + 30])) == 30 for start in range(0, 120, 30))


def test_the_place_after_some_steps_in_all(write_pairs):
    data = dataset(write_pairs("a.tar", 0, 30), batch_size=8)
    assert data.position.after(2) == (0, 2)
    epochs = [len(batches(data)) for _ in range(5)]
    places = [(epoch, i) for epoch, steps in enumerate(epochs) for i in range(steps)]
    assert [data.position.after(step) for step in range(len(places))] == places
    assert [data.position.before(*place) for place in places] == [*range(len(places))]
    assert [data.position.steps(epoch) for epoch in range(5)] == epochs


def test_places_of_epochs_that_end_with_a_part_of_a_batch(write_pairs):
    data = dataset(write_pairs("a.tar", 0, 30), batch_size=8, drop_remainder=False)
    epochs = [len(batches(data)) for _ in range(2)]
    assert epochs == [4, 4]
    places = [(epoch, i) for epoch in range(2) for i in range(4)]
    assert [data.position.after(step) for step in range(8)] == places
    assert [data.position.before(*place) for place in places] == [*range(8)]


@pytest.mark.filterwarnings("ignore:.*does not decode")
def test_an_image_that_does_not_decode_is_replaced_by_a_neighbour(source):
    (batch,) = batches(dataset(source, batch_size=101))
    keys = batch["keys"].tolist()
    assert sorted({*keys}) == [b"%04d" % index for index in range(100)]
    assert len(keys) == 101
    (twice,) = [place for place in range(1, 101) if keys[place] == keys[place - 1]]
    for name, values in batch.items():
        np.testing.assert_array_equal(values[twice], values[twice - 1], err_msg=name)


def test_a_batch_of_which_nothing_decodes_is_an_error(write_pairs):
    broken = [("a.png", b"-"), ("a.txt", b"a"), ("b.png", b"-"), ("b.txt", b"b")]
    shard = write_pairs("a.tar", 0, 0, broken=broken)
    with (
        pytest.warns(UserWarning, match="does not decode"),
        pytest.raises(
            tf.errors.InvalidArgumentError,
            match="No image of a batch decodes",
        ),
    ):
        batches(dataset(shard, batch_size=2))


def test_the_keys_of_a_batch_are_known_after_it(write_pairs):
    data = dataset(write_pairs("a.tar", 0, 40), batch_size=6)
    for epoch in range(2):
        for step, batch in enumerate(data):
            expected = [key.decode() for key in batch["keys"].numpy()]
            assert data.position.keys(epoch, step) == expected
    assert data.position.keys(9, 9) == []


# === Several processes ===


@pytest.mark.filterwarnings("ignore:.*does not decode")
@pytest.mark.parametrize(("count", "num_shards"), [(2, 1), (3, 5)])
def test_processes_share_batches_out_as_they_are_in_one(write_pairs, count, num_shards):
    broken = [("bad.png", b"no image"), ("bad.txt", b"bad")]
    size = 85 // num_shards
    shards = [
        write_pairs(f"{i}.tar", i * size, size, broken=broken if i == 0 else ())
        for i in range(num_shards)
    ]
    rows = 4
    options = {"batch_size": rows * count}
    one = dataset(shards, **options)
    processes = [dataset(shards, **options, process=(i, count)) for i in range(count)]
    for place in (None, None, (3, 1)):
        for data in (one, *processes):
            if place is not None:
                data.position.seek(*place)
        whole, parts = batches(one), [batches(data) for data in processes]
        assert [len(part) for part in parts] == [len(whole)] * count
        for step, batch in enumerate(whole):
            for index, part in enumerate(parts):
                own = slice(index * rows, (index + 1) * rows)
                if b"bad" in batch["keys"] or len({*batch["keys"]}) < rows * count:
                    continue
                for name, value in part[step].items():
                    np.testing.assert_array_equal(value, batch[name][own])


@pytest.mark.parametrize(("count", "num_shards"), [(1, 20), (2, 1), (3, 5), (7, 4)])
def test_every_sample_comes_once_in_an_epoch_also_after_a_stop(
    write_pairs, count, num_shards
):
    size = 100 // num_shards
    shards = [write_pairs(f"{i}.tar", i * size, size) for i in range(num_shards)]
    read = []
    for index in range(count):
        options = {"batch_size": 3 * count, "process": (index, count)}
        first, second = (dataset(shards, **options) for _ in range(2))
        part = batches(first) + batches(first)[:2]
        # Another program resumes.
        second.position.seek(1, 2)
        part += batches(second) + batches(second)
        read.append([batch["keys"].tolist() for batch in part])
    assert len({len(part) for part in read}) == 1
    stream = [key for step in zip(*read) for rows in step for key in rows]
    for epoch in range(2):
        assert len({*stream[epoch * 100 : epoch * 100 + 100]}) == 100


def test_evaluation_shares_every_sample_out(write_pairs):
    shard = write_pairs("a.tar", 0, 40)
    keys = [
        key
        for index in range(3)
        for batch in make(shard, batch_size=6, process=(index, 3))
        for key in batch["keys"].numpy().tolist()
    ]
    assert sorted(keys) == [b"%04d" % index for index in range(40)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(process=(2, 2)), r"`process`.*Received: process=\(2, 2\)"),
        (dict(process=(0, 3)), "`batch_size`.*Received: batch_size=8, 3 processes"),
        (dict(process=(0, 2), seed=None), "`seed`.*Received: seed=None"),
        (
            dict(process=(0, 2), drop_remainder=False),
            "`drop_remainder`.*Received: drop_remainder=False, 2 processes",
        ),
    ],
)
def test_processes_that_cannot_share_are_refused(write_pairs, options, message):
    with pytest.raises(ValueError, match=message):
        make(write_pairs("a.tar", 0, 20), True, **{"seed": 1, **options})
