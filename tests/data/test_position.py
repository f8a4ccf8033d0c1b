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
