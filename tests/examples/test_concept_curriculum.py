"""The concept curriculum against references, and that the program runs."""

import itertools
import json
import pickle

import concept_curriculum as curriculum
import keras
import numpy as np
import pytest
from concept_curriculum import ConceptTextMasking

from keras_cluster_mask.data import CLIPTokenizer

pytestmark = pytest.mark.any_backend

CAPTION = "a the dog cat red blue runs on under tree snow traffic light house"
# Of several tokens, since no merge is learned from it.
LONG = "rhododendron"
WORDS = [*CAPTION.split(), LONG]
GRAPH = {
    "dog": ["cat", "tree", "snow", "red traffic light"],
    "light": ["traffic light", "house", "dog", "on"],
    "traffic light": ["red"],
    "red": ["blue"],
    "blue": ["red traffic light house", "tree house"],
    "tree house": ["rhododendron tree"],
}


def both_ways(graph):
    found = {}
    for name, others in graph.items():
        for other in others:
            found.setdefault(name, set()).add(other)
            found.setdefault(other, set()).add(name)
    return found


NEIGHBORS = both_ways(GRAPH)
TOKENIZERS = {
    length: CLIPTokenizer.train([CAPTION] * 5, 600, length) for length in (6, 10, 200)
}
STAGES = curriculum.find_stages(NEIGHBORS, [["dog"], ["light"]], 2, 4)
MASKING = ConceptTextMasking(STAGES, 4, 1)


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def num_tokens(word):
    return int((TOKENIZERS[200]([word])[0] > 0).sum()) - 2


def random_captions(count, seed=0):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        yield " ".join(draw.choice(WORDS, int(draw.integers(8, 30))))


def mask(caption, length, seed, epoch, masking=MASKING):
    """The words that stay of a caption."""
    tokenizer = TOKENIZERS[length]
    rows = masking.tokenize(tokenizer, [caption], [generator(seed)], [epoch])
    return tokenizer.decode(rows[0]).split()


# === Stages ===


def reference_stages(graph, counts, basic, top, min_count, n):
    """The concepts of each stage, by the definition of the source."""
    degree = {name: len(others) for name, others in graph.items()}
    ranked = sorted(graph, key=lambda name: (-degree[name], name))
    pool = [name for name in ranked[:top] if counts.get(name, 0) > min_count]
    stages = [{*pool[:basic]}]
    for _ in range(n - 2):
        stages.append(stages[-1] | {d for c in stages[-1] for d in graph[c]})
    # In the last stage, every concept.
    return [*stages, {*graph}]


@pytest.mark.parametrize("num_basic", [1, 3, 10])
@pytest.mark.parametrize("num_stages", [2, 4, 6])
def test_stages_of_random_graphs_equal_the_reference(num_basic, num_stages):
    for seed in range(10):
        draw = np.random.default_rng(seed)
        names = [f"{first}{second}" for first in "abcdefgh" for second in "klmnopqr"]
        graph = both_ways(
            {
                name: {*draw.choice(names, draw.integers(1, 4)).tolist()} - {name}
                for name in draw.permutation(names)[:40].tolist()
            }
        )
        words = draw.choice(names, 3000, p=draw.dirichlet(np.full(64, 0.1))).tolist()
        counts = {name: words.count(name) for name in names}
        top = round(num_basic * 5 / 3)
        expected = reference_stages(
            graph, counts, num_basic, top, 3000 * 3e-5, num_stages
        )
        found = curriculum.find_stages(graph, [words], num_basic, num_stages)
        for stage, members in enumerate(expected):
            assert {name for name, first in found.items() if first <= stage} == members


def test_concepts_are_counted_as_whole_concepts():
    """The words of a longer concept do not count for a shorter one."""
    graph = both_ways({"light": ["a", "b", "c"], "traffic light": ["a", "b", "dog"]})
    captions = [["the", "traffic", "light"]] * 9
    stages = curriculum.find_stages(graph, captions, 2, 4)
    assert stages["traffic light"] == 0 < stages["light"]


def test_relations_of_a_file_have_no_direction(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(GRAPH | {"red": ["blue", "red"]}))
    assert curriculum.read_graph(path) == NEIGHBORS


def test_words_are_related_if_they_occur_together_more_than_by_chance():
    captions = [caption.split()[:5] for caption in random_captions(200, 4)]
    captions += [["dog", "cat"]] * 50 + [["tree", "snow"]] * 50 + [["a", "dog"] * 2] * 2
    has = {word: np.array([word in words for words in captions]) for word in WORDS}
    expected = {}
    for first, second in itertools.permutations(WORDS, 2):
        both = has[first] & has[second]
        with np.errstate(divide="ignore"):
            information = np.log(both.mean() / (has[first].mean() * has[second].mean()))
        if both.sum() >= 10 and information > 1e-9:
            expected.setdefault(first, set()).add(second)
    assert curriculum.co_occurrence_graph(captions, 10) == expected
    assert sum(map(len, expected.values())) > 10


# === Words that stay ===


def reference_spans(words):
    """The slice of each concept, and of each other word."""
    first = 0
    while first < len(words):
        spans = [words[first : first + n] for n in (2, 3, 4)]
        size = max([1, *(len(x) for x in spans if " ".join(x) in STAGES)])
        yield slice(first, first + size)
        first += size


def kept_words(caption, length, seed, stage):
    """Whole concepts by score, each if all of it still fits."""
    words, room = caption.split(), length - 2
    if sum(map(num_tokens, words)) <= room:
        return words
    spans = [*reference_spans(words)]
    draws = generator(seed).random(len(spans))
    # Words that may not leave yet stay; one draw for each concept.
    late = [STAGES.get(" ".join(words[span]), 3) > stage for span in spans]
    kept = []
    for index in np.argsort(-(draws + late)):
        of_span = words[spans[index]]
        size = sum(map(num_tokens, of_span))
        if size <= room:
            room -= size
            kept.append(index)
    return [word for index in sorted(kept) for word in words[spans[index]]]


@pytest.mark.parametrize("stage", range(4))
def test_rows_equal_the_reference(stage):
    compared = 0
    for seed, caption in enumerate(random_captions(200)):
        length = (6, 10)[seed % 2]
        expected = kept_words(caption, length, seed, stage)
        if expected:
            assert mask(caption, length, seed, stage) == expected
            compared += len(expected) < len(caption.split())
    assert compared > 150


def test_the_stage_follows_from_the_epoch():
    masking = ConceptTextMasking(STAGES, 4, epochs_per_stage=3)
    stages = [masking.of_epoch(epoch).stage for epoch in range(14)]
    assert stages == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 5
    for epoch, stage in enumerate(stages):
        expected = mask(CAPTION, 10, epoch, stage)
        assert mask(CAPTION, 10, epoch, epoch, masking) == expected


def test_repr_names_what_decides_and_a_masking_pickles():
    made = [
        MASKING,
        ConceptTextMasking(STAGES | {"runs": 0}, 4, 1),
        ConceptTextMasking(STAGES, 5, 1),
        ConceptTextMasking(STAGES, 4, 2),
    ]
    assert len({*map(repr, made)}) == len(made)
    copy = pickle.loads(pickle.dumps(MASKING))
    assert repr(copy) == repr(MASKING)
    assert mask(CAPTION, 6, 0, 2, copy) == mask(CAPTION, 6, 0, 2)


# === The program ===


def test_it_runs_in_a_tiny_setting(shard, capsys):
    flags = f"--train={shard} --min-count=2 --image-size=16 --batch-size=64 --epochs=1"
    model = curriculum.main(curriculum.parse(flags.split()))
    assert isinstance(model, keras.Model)
    assert "New concepts of each stage: {0: " in capsys.readouterr().out
