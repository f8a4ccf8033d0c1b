"""`FrequencyPruning` against a reference, and which samples a dataset has with it."""

import itertools
import re

import numpy as np
import pytest

from keras_cluster_mask.data import FrequencyPruning, image_text_dataset
from keras_cluster_mask.data.frequency_pruning import caption_scores

pytestmark = pytest.mark.any_backend

CAPTIONS = {
    "0": "a red dog in the snow",
    "1": b"The dog, the cat!",
    "2": ["a photo", "a photo of the blue dog"],
    "3": "a photo of a photo of a photo",
    "4": "a a a a a",
    "5": "a " * 30 + "zebra",
    "6": "...",
    "7": "Ünïcödé &amp; caf&eacute;",
}


def tokenizer(captions):
    return [[1, 2, 3]] * len(captions)


def make(source, sampling, batch_size, tokenizer=tokenizer):
    return image_text_dataset(
        source,
        tokenizer,
        16,
        batch_size,
        training=True,
        format="grain",
        include_keys=True,
        sampling=sampling,
    )


def keys(dataset, count):
    iterator = iter(dataset)
    read = [
        key.decode()
        for batch in itertools.islice(iterator, count)
        for key in batch["keys"]
    ]
    iterator.close()
    return read


def reference_scores(captions, threshold):
    """From the words as a regular expression finds them, with no other code."""

    def words(text):
        text = text.decode() if isinstance(text, bytes) else text
        text = text.replace("&amp;", "&").replace("&eacute;", "é").lower()
        return re.findall(r"[^\W\d_]+|[^\w\s]+", text)

    texts = [
        [words(text) for text in ([each] if isinstance(each, str | bytes) else each)]
        for each in captions
    ]
    flat = [word for each in texts for text in each for word in text]
    scores = []
    for each in texts:
        of_each = []
        for text in each:
            product = 1.0
            for word in text[:30]:
                frequency = flat.count(word) / len(flat)
                if frequency > threshold:
                    product *= 1 - (threshold / frequency) ** 0.5
            of_each.append((1 - product) / max(len(text[:30]), 1))
        scores.append(np.mean(of_each))
    return scores


@pytest.mark.parametrize("threshold", [1e-7, 0.02, 0.1])
def test_scores_equal_the_reference(threshold):
    captions = [*CAPTIONS.values(), "", ["", "a dog"]]
    expected = reference_scores(captions, threshold)
    listed = ([each] if isinstance(each, str | bytes) else each for each in captions)
    found = caption_scores(listed, threshold)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)
    assert len({*np.round(expected, 12)}) > 5
    assert found[-2] == 0


@pytest.mark.parametrize("share", [0.01, 0.5, 0.6, 1.0])
def test_the_pairs_of_the_highest_scores_stay(noise, share):
    source = [
        {"image": noise(0), "caption": text, "__key__": key}
        for key, text in CAPTIONS.items()
    ]
    scores = reference_scores(CAPTIONS.values(), 0.02)
    count = max(int(share * 8), 1)
    ranked = sorted(range(8), key=lambda number: -scores[number])
    expected = sorted(key_ for key_ in np.array([*CAPTIONS])[ranked[:count]])
    fitted = FrequencyPruning(share, 0.02).fit(CAPTIONS)
    for sampling in (fitted, FrequencyPruning(share, 0.02)):
        dataset = make(source, sampling, 1)
        assert len(dataset) == count
        read = keys(dataset, 3 * count)
        for epoch in range(3):
            assert sorted(read[epoch * count : (epoch + 1) * count]) == expected


def test_pairs_without_a_caption_are_named(write_pairs):
    source = write_pairs("a.tar", 0, 6)
    captions = {f"{number:04}": "a dog" for number in range(6) if number != 4}
    message = r"`captions` must.*Received: .* 1 of 6 samples.*'0004'"
    with pytest.raises(ValueError, match=message):
        make(source, FrequencyPruning(0.5).fit(captions), 2)
    with pytest.raises(ValueError, match=r"`captions`.*`include_captions`.*6 samples"):
        make(source, FrequencyPruning(0.5), 2, tokenizer=None)


def test_captions_that_are_read_may_have_equal_keys(write_pairs):
    source = [write_pairs("a.tar", 0, 4), write_pairs("b.tar", 3, 4)]
    assert len(make(source, FrequencyPruning(0.5), 4)) == 1
    captions = {f"{number:04}": "a dog" for number in range(7)}
    with pytest.raises(ValueError, match=r"`source`.*Received: .*'0003' twice"):
        make(source, FrequencyPruning(0.5).fit(captions), 4)


@pytest.mark.parametrize(
    ("make_sampling", "message"),
    [
        (lambda: FrequencyPruning(0), "`share`.*share=0"),
        (lambda: FrequencyPruning(0.5, 0.0), "`threshold`.*threshold=0.0"),
        (lambda: FrequencyPruning(0.5).fit(["a dog"]), "`captions`.*type list"),
        (lambda: FrequencyPruning(0.5).fit({}), "`captions`.*0 samples"),
        (lambda: FrequencyPruning(0.5).fit({"a": " "}), "`captions`.*1 samples"),
        (lambda: FrequencyPruning(0.5).fit({1: "a dog"}), "`keys`.*1 of type int"),
        (
            lambda: FrequencyPruning(0.5).fit({"a": "a dog", "b": None}),
            r"`captions`.*Received: captions\['b'\]=None",
        ),
        (
            lambda: FrequencyPruning(0.5).fit({"b": ["a dog", float("nan")]}),
            r"`captions`.*Received: captions\['b'\]=\['a dog', nan\]",
        ),
        (
            lambda: FrequencyPruning(0.5, 0.5).fit({"a": "a dog"}),
            "`threshold`.*threshold=0.5, a highest share of 0.5 among 2 words",
        ),
    ],
)
def test_invalid_arguments_of_pruning_are_named(make_sampling, message):
    with pytest.raises(ValueError, match=message):
        make_sampling()
