import itertools

import numpy as np
import pytest

from keras_cluster_mask.data.order import Order

pytestmark = pytest.mark.any_backend


def order_of(*lengths, weights=(1.0,), seed=0, block_size=1):
    return Order(lengths, weights, seed, block_size)


def read(order, count, first=0):
    return [order[position] for position in range(first, first + count)]


def epoch(order, number):
    (length,) = order.lengths
    return read(order, length, number * length)


@pytest.mark.parametrize("block_size", [1, 3, 7, 64, 101, 200])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 64, 101])
def test_each_epoch_is_a_permutation(num_samples, block_size):
    order = order_of(num_samples, block_size=block_size)
    for number in (0, 1, 2, 1000):
        assert sorted(epoch(order, number)) == [*range(num_samples)]


@pytest.mark.parametrize("block_size", [1, 4])
def test_epochs_and_seeds_have_orders_of_their_own(block_size):
    orders = {
        tuple(epoch(order_of(100, seed=seed, block_size=block_size), number))
        for seed, number in itertools.product((0, 1, 2, 2**62), range(4))
    }
    assert len(orders) == 16
    assert tuple(range(100)) not in orders


def test_places_with_equal_bits_are_not_correlated():
    """The cipher shuffles two halves of 4 bits; a lag of 16 changes only one."""
    order = order_of(250)
    ranks = np.array([epoch(order, number) for number in range(300)])
    ranks = (ranks - ranks.mean()) / ranks.std()
    scores = np.sum(ranks[:, 16:] * ranks[:, :-16], axis=1) / (250 - 16) ** 0.5
    # The mean of 300 squares varies by 8 %; with too few rounds it is 3 and more.
    assert 0.7 < np.mean(scores**2) < 1.3


def test_blocks_keep_neighbors_together_and_start_elsewhere_in_each_epoch():
    order = order_of(100, block_size=8)
    starts = []
    for number in range(4):
        blocks = np.array(epoch(order, number)[:96]).reshape(12, 8)
        # A block may contain the last sample and the first.
        np.testing.assert_array_equal(np.diff(blocks, axis=1) % 100, 1)
        assert (np.diff(blocks[:, 0]) % 100 != 8).any()
        starts.append({int(first) % 8 for first in blocks[:, 0]})
    assert len({tuple(sorted(each)) for each in starts}) > 1


def test_a_mix_reads_its_sources_in_proportion_to_their_weights():
    numbers = read(order_of(30, 50, 20, weights=(1, 2, 5)), 800)
    which = np.searchsorted([30, 80], numbers, "right")
    for weight, number in ((1, 0), (2, 1), (5, 2)):
        assert abs(np.sum(which == number) - 100 * weight) <= 1
        # Not only in total, but in each batch.
        counts = np.sum(which.reshape(10, 80) == number, axis=1)
        assert np.abs(counts - 10 * weight).max() <= 1


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_mix_reads_every_sample_of_a_source_before_it_repeats_one(block_size):
    numbers = read(order_of(30, 50, weights=(3, 1), block_size=block_size), 440)
    for source in (range(30), range(30, 80)):
        own = [number for number in numbers if number in source]
        first, second = own[: len(source)], own[len(source) : 2 * len(source)]
        assert sorted(first) == sorted(second) == [*source]
        assert first != second


def test_sources_of_equal_size_do_not_pair_their_samples_in_a_mix():
    """Two texts of the same images would otherwise meet in each batch."""
    numbers = np.array(read(order_of(1000, 1000, weights=(1.0, 1.0)), 400))
    assert np.mean(numbers[::2] % 1000 == numbers[1::2] % 1000) < 0.05
