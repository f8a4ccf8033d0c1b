"""`Sampling`: how often samples occur, and which are read with it in a dataset."""

import itertools
import math

import numpy as np
import pytest

from keras_cluster_mask.data import Sampling
from tests.data.reading import Counted, Keys, batches, make_dataset, together

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:.*are broken"),
]


def key_of(number):
    return f"{number:04}"


# Expected copies: of most samples a random part, and of the last several.
COPIES = {
    key_of(n): 0.0 if n < 4 else 0.6 if n < 48 else 1.0 if n < 55 else 2.4
    for n in range(60)
}


def make(source, sampling, **options):
    options = {"batch_size": 4, **options}
    return make_dataset(source, True, sampling=sampling, **options)


def epochs_of(source, sampling, count):
    """The keys of the samples of each epoch, as batches of one sample have them."""
    dataset, epochs, first = make(source, sampling, batch_size=1), [], 0
    for _ in range(count):
        dataset.start = first
        last = first + len(dataset)
        epochs.append(sorted(key for (key,) in batches(dataset, first, last)))
        first = last
    return epochs


@pytest.fixture
def shards(write_pairs):
    broken = [("x.txt", b"no image")]
    return [
        write_pairs("a.tar", 0, 40),
        write_pairs("b.tar", 40, 15, broken),
        write_pairs("c.tar", 55, 5),
    ]


# === What is drawn ===


def test_copies_are_the_probability_rounded_up_or_down_at_random():
    draw = Sampling(COPIES).of_index(Keys(COPIES))
    counts = np.array([np.bincount(draw(epoch)) for epoch in range(500)])
    expected = np.array([*COPIES.values()])
    assert (counts >= np.floor(expected)).all()
    assert (counts <= np.ceil(expected)).all()
    for value in {*COPIES.values()}:
        of_value = counts[:, expected == value]
        rest = value - math.floor(value)
        # Five standard deviations.
        bound = 5 * math.sqrt(rest * (1 - rest) / of_value.size)
        assert abs(of_value.mean() - value) <= bound


def test_samples_are_drawn_anew_in_each_epoch_and_by_themselves():
    keys = Keys(map(str, range(20_000)))
    masks = np.zeros((7, 20_000))
    for row, (seed, epoch) in enumerate([*((0, n) for n in range(6)), (1, 0)]):
        draw = Sampling(dict.fromkeys(keys, 0.3), seed).of_index(keys)
        masks[row, draw(epoch)] = 1
    np.testing.assert_allclose(masks.mean(axis=1), 0.3, atol=0.02)
    # Between epochs, between seeds, and between neighbors.
    np.testing.assert_allclose(np.corrcoef(masks), np.eye(7), atol=0.03)
    for mask in masks:
        assert abs(np.corrcoef(mask[1:], mask[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize(
    "probability",
    [
        pytest.param({k.encode(): v for k, v in COPIES.items()}, id="bytes"),
        pytest.param(COPIES | {"other": 7.0}, id="others"),
        pytest.param({k: np.array(v) for k, v in COPIES.items()}, id="arrays"),
    ],
)
def test_keys_of_bytes_and_of_other_samples_change_nothing(shards, probability):
    expected = epochs_of(shards, Sampling(COPIES, seed=3), 3)
    assert epochs_of(shards, Sampling(probability, seed=3), 3) == expected
    assert len({*map(tuple, expected)}) == 3


@pytest.mark.parametrize("form", [list, iter, np.array, np.char.encode])
def test_samples_of_keys_come_once_in_each_epoch(shards, form):
    kept = [key_of(number) for number in range(1, 60, 7)]
    keys = form([*kept, "elsewhere"])
    assert epochs_of(shards, Sampling(keys), 3) == [kept] * 3
    twice = [*kept, kept[-1]]
    assert epochs_of(shards, Sampling(twice), 2) == [twice] * 2


# === In a dataset ===


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_epochs_are_the_same_for_all_processes_and_after_a_stop(
    shards, processes, block_size
):
    epochs = epochs_of(shards, Sampling(COPIES, seed=5), 4)
    assert len({len(epoch) for epoch in epochs}) > 1
    steps = sum(map(len, epochs)) // 8
    options, parts = {"batch_size": 8, "block_size": block_size}, []
    for number in range(processes):
        # Another program resumes, which began elsewhere.
        first, second = (
            make(shards, Sampling(COPIES, 5), process=(number, processes), **options)
            for _ in range(2)
        )
        rest = batches(second, steps // 2, steps)
        parts.append(batches(first, 0, steps // 2) + rest)
    read = iter(together(parts))
    for epoch in epochs[:3]:
        received = [*itertools.islice(read, len(epoch))]
        assert sorted(received) == epoch != received


@pytest.mark.parametrize("has_keys", [False, True])
def test_samples_that_are_left_out_are_not_read(noise, has_keys):
    name = "__key__" if has_keys else "other"
    rows = [{"image": noise(0), "caption": "a", name: f"0{n}"} for n in range(300)]
    source = Counted(rows)
    keys = [f"0{n}" if has_keys else f"{n}" for n in range(300)]
    dataset = make(
        source, Sampling(dict.fromkeys(keys, 0) | dict.fromkeys(keys[::4], 0.4))
    )
    source.read.clear()
    read = {int(key) for batch in batches(dataset, 0, 10) for key in batch}
    assert len(read) > 10
    assert read <= {*source.read} <= {*range(0, 300, 4)}


def test_the_steps_of_an_epoch_are_those_of_the_mean_length(shards):
    dataset = make(shards, Sampling(COPIES))
    assert dataset.steps_per_epoch == int(sum(COPIES.values())) // 4


def test_another_sampling_is_other_data(shards):
    def describe(sampling):
        return make(shards, sampling).description["sampling"]

    others = COPIES | {key_of(59): 1.0}, [*COPIES][1:]
    samplings = None, Sampling(COPIES, 1), *map(Sampling, (COPIES, *others))
    assert len({*map(describe, samplings)}) == 5
    assert describe(Sampling(dict(COPIES))) == describe(samplings[2])


# === Errors ===


@pytest.mark.parametrize(
    ("probability", "message"),
    [
        *((other, "") for other in (len, 0.5, "0123")),
        *(({"0000": x}, "") for x in (-0.1, np.nan, np.inf, [1], "1")),
        ({k: v for k, v in COPIES.items() if k != "0041"}, "1 of 60.*'0041'"),
        ({}, "60 of 60 samples.*'0000'"),
        (["0000.png"], "0 of 60 samples.*'0000'"),
        (dict.fromkeys(COPIES, 0.01), "0.6 of 60 samples"),
        ([*COPIES][:15], "batch_size=16, 15 samples"),
    ],
)
def test_what_chooses_no_samples_is_refused(shards, probability, message):
    name = "`(probability|sampling)`"
    with pytest.raises(ValueError, match=rf"{name}.*Received: .*{message}"):
        make(shards, Sampling(probability), batch_size=16)


def test_a_key_in_two_shards_is_named(shards, write_pairs):
    shards.append(write_pairs("d.tar", 3, 1))
    with pytest.raises(ValueError, match=r"`source`.*Received: .*'0003' twice"):
        make(shards, Sampling(COPIES))
