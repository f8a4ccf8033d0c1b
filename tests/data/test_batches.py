"""What a batch holds: crops, captions, tokens and keys."""

import functools
import json

import numpy as np
import pytest

from keras_cluster_mask.data.batches import Captions, Row
from keras_cluster_mask.data.samples import Sample
from tests.data.reading import column, make_dataset, pairs_of, take

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:.*skipped"),
]


make = functools.partial(make_dataset, batch_size=4)


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

    batches = take(make(several, True, tokenizer=tokenizer), 2 * 30)
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
    batches = take(make(several, tokenizer=tokenizer))
    found = np.concatenate([batch["token_ids"] for batch in batches])
    assert found.tolist() == [[i, 0] for i in range(8)]


def test_half_letters_are_not_changed():
    pair = Sample("x", "1", ("{} \ud800",))
    captions = Captions(None, False, include_captions=True)
    batch = captions.batch([Row(0, pair, None, None, 0)])
    assert batch["captions"].tolist() == [("{} \ud800",)]


@pytest.mark.parametrize("training", [True, False])
def test_all_captions_of_an_image_are_a_tuple(several, training):
    batches = take(make(several, training, include_captions=True), 2)
    for key, captions in zip(column(batches, "keys"), column(batches, "captions")):
        words = ("one", "two", "three")
        assert captions == tuple(f"{key} {word}" for word in words)
    assert batches[0]["captions"].shape == (4,)
    assert make(several, include_captions=True).element_spec["captions"].dtype == (
        "object"
    )


@pytest.mark.parametrize("training", [True, False])
def test_rows_of_a_batch_belong_together(write_pairs, training):
    shard = write_pairs("a.tar", 0, 30)
    dataset = make(shard, training, include_captions=True)
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
    dataset = make(shard, True, image_transform=transform)
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
    expected = take(make(broken_tar(write_tar, noise, {}), True, batch_size=8), 9)
    dataset = make(broken_tar(write_tar, noise, broken), True, batch_size=8)
    for batch, intact in zip(take(dataset, 9), expected, strict=True):
        keys, wanted = batch["keys"].tolist(), intact["keys"].tolist()
        assert {*map(int, keys)}.isdisjoint(broken)
        # The rows that are intact keep their places.
        changed = [int(want) for key, want in zip(keys, wanted) if key != want]
        assert changed == [int(want) for want in wanted if int(want) in broken]


def test_each_sample_that_stands_in_is_cropped_on_its_own(write_tar, noise):
    shard = broken_tar(write_tar, noise, {*range(1, 24)})
    (batch,) = take(make(shard, True, batch_size=24, crop_scale=(0.2, 0.5)), 1)
    assert {*batch["keys"]} == {"00"}
    assert len(np.unique(batch["images"].reshape(24, -1), axis=0)) == 24


def test_a_source_of_broken_samples_is_an_error_in_training(write_tar, noise):
    shard = broken_tar(write_tar, noise, {*range(24)})
    with pytest.raises(RuntimeError, match=r"'\d\d' of .*others of its source"):
        take(make(shard, True), 1)


def test_evaluation_leaves_out_broken_samples_and_empty_batches(write_tar, noise):
    shard = broken_tar(write_tar, noise, {2, *range(4, 12)})
    batches = take(make(shard, include_captions=True))
    assert [len(batch["images"]) for batch in batches] == [3, 4, 4, 4]
    good = 0, 1, 3, *range(12, 24)
    assert column(batches, "keys") == [f"{i:02}" for i in good]
    assert all(len(v) == len(b["keys"]) for b in batches for v in b.values())
