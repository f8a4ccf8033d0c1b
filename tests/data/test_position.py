"""A pipeline goes on from any place of any epoch."""

import numpy as np
import pytest

from .test_dataset import assert_same, batches, make

pytest.importorskip("tensorflow")


@pytest.fixture
def source(write_pairs):
    broken = [("bad.png", b"no picture"), ("bad.txt", b"bad")]
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
@pytest.mark.parametrize("done", [1, 5, 11])
def test_the_rest_of_an_epoch_is_what_was_not_read_of_it(source, done):
    one, other = dataset(source), dataset(source)
    batches(one)
    reached, whole = [], []
    for index, batch in enumerate(one):
        whole.append({name: value.numpy() for name, value in batch.items()})
        reached.append(one.position.reached(index))
    assert len(whole) == 12
    other.position.seek(1, reached[done])
    rest = batches(other)
    assert_same(rest, whole[done + 1 :])
    if rest:
        # Counted from the start of the epoch.
        assert other.position.reached(0) == reached[done + 1]


def test_the_keys_of_a_batch_are_known_after_it(write_pairs):
    data = dataset(write_pairs("a.tar", 0, 40))
    for index, batch in enumerate(data):
        expected = [key.decode() for key in batch["keys"].numpy()]
        assert data.position.keys(index) == expected
    assert data.position.keys(99) == []


def test_evaluation_has_epochs_too_which_are_all_the_same(write_pairs):
    data = make(write_pairs("a.tar", 0, 20))
    first = batches(data)
    assert_same(batches(data), first)
    data.position.seek(5, data.position.reached(0))
    np.testing.assert_array_equal(batches(data)[0]["keys"], first[1]["keys"])


# === Several processes ===


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("num_shards", [1, 5])
def test_processes_share_an_epoch_out_and_take_equal_steps(
    write_pairs, count, num_shards
):
    size = 85 // num_shards
    shards = [write_pairs(f"{i}.tar", i * size, size) for i in range(num_shards)]
    for done in (0, 3 * 2 * count):
        taken = []
        for index in range(count):
            data = dataset(shards, batch_size=2 * count, process=(index, count))
            data.position.seek(1, done)
            taken.append(batches(data))
        steps = {len(x) for x in taken}
        assert steps == {(85 - done) // (2 * count)}
        keys = [k for x in taken for batch in x for k in batch["keys"].tolist()]
        assert len(keys) == len(set(keys)) == steps.pop() * 2 * count
        assert all(len(b["keys"]) == 2 for x in taken for b in x)


def test_a_batch_is_the_same_however_many_processes_share_it(write_pairs):
    shard = write_pairs("a.tar", 0, 40)
    whole = batches(dataset(shard, batch_size=6))
    parts = [
        batches(dataset(shard, batch_size=6, process=(index, 3))) for index in range(3)
    ]
    for step, batch in enumerate(whole):
        for index in range(3):
            part = parts[index][step]
            for name, value in part.items():
                np.testing.assert_array_equal(value, batch[name][index::3])


def test_all_processes_say_the_same_place(write_pairs):
    shard = write_pairs("a.tar", 0, 40)
    places = set()
    for index in range(3):
        data = dataset(shard, batch_size=6, process=(index, 3))
        batches(data)
        places.add(data.position.reached(2))
    assert places == {18}


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
    ],
)
def test_processes_that_cannot_share_are_refused(write_pairs, options, message):
    with pytest.raises(ValueError, match=message):
        make(write_pairs("a.tar", 0, 20), True, **{"seed": 1, **options})
