import itertools
import time
from concurrent import futures

import numpy as np
import pytest

from keras_cluster_mask.data.order import Mix, Order

pytestmark = pytest.mark.any_backend


def read(order, count, first=0):
    """The numbers of samples in their sources."""
    return [order[position][1] for position in range(first, first + count)]


def epoch(order, number):
    return read(order, order.num_samples, number * order.num_samples)


@pytest.mark.parametrize("block_size", [1, 3, 7, 64, 101, 200])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 64, 101])
def test_each_epoch_is_a_permutation(num_samples, block_size):
    order = Order(num_samples, 0, block_size)
    for number in (0, 1, 2, 1000):
        assert sorted(epoch(order, number)) == [*range(num_samples)]


@pytest.mark.parametrize("block_size", [1, 4])
def test_epochs_and_seeds_have_orders_of_their_own(block_size):
    orders = {
        tuple(epoch(Order(100, seed, block_size), number))
        for seed, number in itertools.product((0, 1, 2, 2**62), range(4))
    }
    assert len(orders) == 16
    assert tuple(range(100)) not in orders


def test_places_with_equal_bits_are_not_correlated():
    """The cipher shuffles two halves of 4 bits; a lag of 16 changes only one."""
    order = Order(250, 0)
    ranks = np.array([epoch(order, number) for number in range(300)])
    ranks = (ranks - ranks.mean()) / ranks.std()
    scores = np.sum(ranks[:, 16:] * ranks[:, :-16], axis=1) / (250 - 16) ** 0.5
    # The mean of 300 squares varies by 8 %; with too few rounds it is 3 and more.
    assert 0.7 < np.mean(scores**2) < 1.3


def test_blocks_keep_neighbors_together_and_start_elsewhere_in_each_epoch():
    order = Order(100, 0, block_size=8)
    starts = []
    for number in range(4):
        blocks = np.array(epoch(order, number)[:96]).reshape(12, 8)
        # A block may contain the last sample and the first.
        np.testing.assert_array_equal(np.diff(blocks, axis=1) % 100, 1)
        assert (np.diff(blocks[:, 0]) % 100 != 8).any()
        starts.append({int(first) % 8 for first in blocks[:, 0]})
    assert len({tuple(sorted(each)) for each in starts}) > 1


@pytest.mark.parametrize("block_size", [1, 4])
def test_sampling_chooses_the_samples_of_each_epoch(block_size):
    # The third epoch is empty.
    times = [1, 3, 0, 2]

    def sampling(epoch):
        return np.repeat(np.arange(epoch, 20), times[epoch])

    order = Order(20, 0, block_size, sampling)
    first = 0
    for number in (0, 1, 3):
        expected = sampling(number)
        received = read(order, len(expected), first)
        assert sorted(received) == expected.tolist()
        assert received != expected.tolist()
        drawn = order.draw(number, 99, np.random.default_rng(0))
        assert sorted(drawn) == [(0, sample) for sample in expected]
        assert order.place(first) == (number, 0)
        assert order.place(first + len(expected) - 1) == (number, len(expected) - 1)
        first += len(expected)


@pytest.mark.parametrize("first", [0, 300])
def test_threads_ask_a_sampler_once_for_each_epoch(first):
    asked = []

    def sampling(epoch):
        asked.append(epoch)
        # Long enough for other threads to ask as well.
        time.sleep(0.02)
        return np.arange(50)

    order = Order(100, 0, sampling=sampling)
    with futures.ThreadPoolExecutor(8) as threads:
        for start in (first, first + 50):
            list(threads.map(order.__getitem__, range(start, start + 8)))
    assert asked == [*range(first // 50 + 2)]


def orders_of(*counts, **options):
    return [Order(n, 0, source=i, **options) for i, n in enumerate(counts)]


def test_a_mix_reads_its_sources_in_proportion_to_their_weights():
    mix = Mix(orders_of(30, 50, 20), [1, 2, 5])
    assert mix.num_samples == 100
    which = np.array([mix[position][0] for position in range(800)])
    for weight, number in ((1, 0), (2, 1), (5, 2)):
        assert abs(np.sum(which == number) - 100 * weight) <= 1
        # Not only in total, but in each batch.
        counts = np.sum(which.reshape(10, 80) == number, axis=1)
        assert np.abs(counts - 10 * weight).max() <= 1


def test_an_epoch_of_a_mix_has_as_many_positions_as_its_sources_have_samples():
    mix = Mix([Order(3, 0), Order(5, 0)], [1, 1])
    epochs = [mix.place(position)[0] for position in range(24)]
    assert epochs == [0] * 8 + [1] * 8 + [2] * 8
    assert [mix.place(position)[1] for position in range(6, 10)] == [6, 7, 0, 1]


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_mix_reads_every_sample_of_a_source_before_it_repeats_one(block_size):
    mix = Mix(orders_of(30, 50, block_size=block_size), [3, 1])
    numbers = [mix[position] for position in range(440)]
    for source, size in ((0, 30), (1, 50)):
        own = [number for which, number in numbers if which == source]
        first, second = own[:size], own[size : 2 * size]
        assert sorted(first) == sorted(second) == [*range(size)]
        assert first != second


def test_sources_of_equal_size_do_not_pair_their_samples_in_a_mix():
    """Two texts of the same images would otherwise meet in each batch."""
    numbers = np.array(read(Mix(orders_of(1000, 1000), [1.0, 1.0]), 400))
    assert np.mean(numbers[::2] == numbers[1::2]) < 0.05
