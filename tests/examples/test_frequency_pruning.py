"""WFPP against a reference, and that the program runs."""

import re

import frequency_pruning as pruning
import numpy as np
import pytest

pytestmark = pytest.mark.any_backend

CAPTIONS = {
    "0": "a red dog in the snow",
    "1": b"The dog, the cat!",
    "2": "a photo of the blue dog",
    "3": "a photo of a photo of a photo",
    "4": "a a a a a",
    "5": "a " * 30 + "zebra",
    "6": "...",
    "7": "Ünïcödé &amp; caf&eacute;",
    "8": "",
}


def reference_scores(captions, threshold):
    """From the words as a regular expression finds them, with no other code."""

    def words(text):
        text = text.decode() if isinstance(text, bytes) else text
        text = text.replace("&amp;", "&").replace("&eacute;", "é").lower()
        return re.findall(r"[^\W\d_]+|[^\w\s]+", text)

    texts = [words(text) for text in captions]
    flat = [word for text in texts for word in text]
    scores = []
    for text in texts:
        product = 1.0
        for word in text[:30]:
            frequency = flat.count(word) / len(flat)
            if frequency > threshold:
                product *= 1 - (threshold / frequency) ** 0.5
        scores.append((1 - product) / max(len(text[:30]), 1))
    return scores


@pytest.mark.parametrize("threshold", [1e-7, 0.02, 0.1])
def test_scores_equal_the_reference(threshold):
    expected = reference_scores(CAPTIONS.values(), threshold)
    found = pruning.scores(CAPTIONS.values(), threshold)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)
    assert len({*np.round(expected, 12)}) > 4
    assert found[-1] == 0


@pytest.mark.parametrize("share", [0.01, 0.5, 0.6, 1.0])
def test_the_pairs_of_the_highest_scores_stay(share):
    scores = reference_scores(CAPTIONS.values(), 0.02)
    ranked = sorted(CAPTIONS, key=lambda key: -scores[int(key)])
    expected = ranked[: max(int(share * 9), 1)]
    assert pruning.choose(CAPTIONS, share, 0.02) == expected


def test_it_runs_in_a_tiny_setting(shard, capsys):
    flags = f"--train={shard} --share=0.5 --image-size=16 --batch-size=32 --epochs=1"
    model = pruning.main(pruning.parse(flags.split()))
    assert "32 of 64 pairs stay." in capsys.readouterr().out
    # One step on the pairs that stay, and two on all.
    assert int(model.optimizer.iterations) == 3
