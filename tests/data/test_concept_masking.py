"""`ConceptTextMasking` against NumPy references, and its stages in a dataset."""

import functools
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from keras_cluster_mask.data import (
    CLIPTokenizer,
    ConceptTextMasking,
    RandomTextMasking,
    co_occurrence_graph,
    image_text_dataset,
    read_captions,
)

pytestmark = pytest.mark.any_backend

CAPTION = "a the dog cat red blue runs on under tree snow traffic light house"
WORDS = CAPTION.split()
# Of several tokens, since no merge is learned from it.
LONG = "rhododendron"
GRAPH = {
    "dog": ["cat", "tree", "snow", "red traffic light"],
    "light": ["traffic light", "house", "dog", "on"],
    "traffic light": ["red"],
    "red": ["blue"],
    "blue": ["red traffic light house", "tree house"],
    "tree house": ["rhododendron tree"],
    "under": [],
}
NUM_BASIC = 2


def make_tokenizer(context_length):
    return CLIPTokenizer.train([CAPTION] * 5, 600, context_length)


TOKENIZERS = {length: make_tokenizer(length) for length in (3, 6, 8, 10, 200)}
MASKING = ConceptTextMasking(GRAPH, num_basic=NUM_BASIC)


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def num_tokens(word):
    row = TOKENIZERS[200]([word])[0]
    return int((row > 0).sum()) - 2


def mask(masking, caption, length, seed, epoch=0):
    """The words that stay of a caption."""
    tokenizer = TOKENIZERS[length]
    rows = masking.tokenize(tokenizer, [caption], [generator(seed)], [epoch])
    return tokenizer.decode(rows[0]).split()


def random_captions(count, seed=0):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        yield " ".join(draw.choice([*WORDS, LONG], int(draw.integers(8, 30))))


# === References ===


def stages(graph, num_basic, num_stages, counts=None, least=0):
    """The concepts of each stage, by the adjacency matrix; the last has all."""
    names = sorted({*graph, *itertools.chain(*graph.values())})
    place = {name: index for index, name in enumerate(names)}
    adjacent = np.zeros((len(names), len(names)), int)
    for name, others in graph.items():
        for other in others:
            adjacent[place[name], place[other]] = adjacent[
                place[other], place[name]
            ] = 1
    ranked = np.lexsort((np.arange(len(names)), -adjacent.sum(0)))
    pool = ranked[: round(num_basic * 5 / 3)]
    if counts is not None:
        pool = [index for index in pool if counts.get(names[index], 0) > least]
    reached = np.zeros(len(names), int)
    reached[pool[:num_basic]] = 1
    found = []
    for _ in range(num_stages - 1):
        found.append({names[index] for index in np.flatnonzero(reached)})
        reached = ((reached + adjacent @ reached) > 0).astype(int)
    return [*found, {*names}]


def spans(words, concepts):
    """Pairs of the first and last place of each concept, and of each other word."""
    first = 0
    while first < len(words):
        size = max(
            size
            for size in (1, 2, 3, 4)
            if size == 1 or tuple(words[first : first + size]) in concepts
        )
        size = min(size, len(words) - first)
        yield first, first + size - 1
        first += size


def concept_score(words, found, u, members):
    """Not less than 1 for words that may not leave yet; one draw for each concept."""
    score = np.empty(len(words))
    for draw, (first, last) in zip(u, found):
        may_leave = members is None or " ".join(words[first : last + 1]) in members
        score[first : last + 1] = draw if may_leave else 1 + draw
    return score


def kept_words(caption, length, seed, members):
    """Whole concepts by score, each if all of it still fits."""
    words, room = caption.split(), length - 2
    if sum(map(num_tokens, words)) <= room:
        return words
    concepts = {tuple(name.split()) for name in MASKING.stages}
    found = [*spans(words, concepts)]
    score = concept_score(words, found, generator(seed).random(len(found)), members)
    kept = []
    for first, last in sorted(found, key=lambda span: -score[span[0]]):
        size = sum(num_tokens(word) for word in words[first : last + 1])
        if size <= room:
            room -= size
            kept += range(first, last + 1)
    return [words[index] for index in sorted(kept)]


MEMBERS = [*stages(GRAPH, NUM_BASIC, 4)[:3], None]


@pytest.mark.parametrize("stage", range(4))
def test_rows_equal_the_reference(stage):
    compared = 0
    for seed, caption in enumerate(random_captions(200)):
        length = (6, 10)[seed % 2]
        expected = kept_words(caption, length, seed, MEMBERS[stage])
        if expected:
            assert mask(MASKING, caption, length, seed, stage) == expected
            compared += len(expected) < len(caption.split())
    assert compared > 150


@pytest.mark.parametrize("num_basic", [1, 3, 10])
@pytest.mark.parametrize("num_stages", [2, 4, 6])
def test_stages_of_random_graphs_equal_the_reference(num_basic, num_stages):
    for seed in range(10):
        draw = np.random.default_rng(seed)
        names = [f"{first}{second}" for first in "abcdefgh" for second in "klmnopqr"]
        graph = {
            name: sorted({*draw.choice(names, draw.integers(0, 4))} - {name})
            for name in draw.permutation(names)[:40].tolist()
        }
        words = draw.choice(names, 3000, p=draw.dirichlet(np.full(64, 0.1))).tolist()
        counts = {name: words.count(name) for name in names}
        for texts, count in ((None, None), ([" ".join(words)], counts)):
            expected = stages(graph, num_basic, num_stages, count, 3000 * 3e-5)
            if not expected[0]:
                with pytest.raises(ValueError, match="no concept is basic"):
                    ConceptTextMasking(graph, texts, num_basic, num_stages)
                continue
            masking = ConceptTextMasking(graph, texts, num_basic, num_stages)
            for stage, members in enumerate(expected):
                received = {name for name, at in masking.stages.items() if at <= stage}
                assert received == members


def test_stages_grow_and_the_last_has_every_concept():
    at = {}
    for name, stage in MASKING.stages.items():
        at.setdefault(stage, set()).add(name)
    assert at[0] == {"dog", "light"}
    assert at[1] == {
        *("cat", "tree", "snow", "red traffic light", "traffic light", "house", "on")
    }
    assert at[2] == {"red"}
    # Those of the stages that are not reached before, and without any neighbor.
    assert {"blue", "tree house", "rhododendron tree", "under"} <= at[3]


def test_relations_have_no_direction_and_their_order_has_no_effect():
    other = {}
    for name, related in reversed(GRAPH.items()):
        other.setdefault(name, set())
        for each in related:
            other.setdefault(each, set()).add(name)
    again = ConceptTextMasking(other, num_basic=NUM_BASIC)
    assert again.stages == MASKING.stages
    assert repr(again) == repr(MASKING)
    # A concept that is related to itself has no more neighbors.
    loop = {**GRAPH, "red": ["blue", "red"]}
    assert ConceptTextMasking(loop, num_basic=2).stages == MASKING.stages


def test_basic_concepts_are_frequent_and_have_many_neighbors():
    graph = {f"{a}{b}": [f"{a}{b}{c}" for c in "uvwxyz"] for a in "klm" for b in "opq"}
    rare = " ".join(["dog"] * 100_000 + ["ko", "kp", "kp", "kp"] + ["kq"] * 4)
    stages = ConceptTextMasking(graph, [rare], num_basic=6).stages
    # 3e-5 of 100,008 words are three.
    assert [name for name, stage in stages.items() if not stage] == ["kq"]
    # Of equal degrees, the first by name; the counts of all are enough.
    stages = ConceptTextMasking(graph, num_basic=6).stages
    assert sorted(n for n, s in stages.items() if not s) == sorted(graph)[:6]
    # A tenth of 63 concepts, rounded up.
    stages = ConceptTextMasking(graph).stages
    assert sum(not stage for stage in stages.values()) == 7


def test_concepts_are_counted_as_whole_concepts():
    """The words of a longer concept do not count for a shorter one."""
    graph = {"light": ["a", "b", "c"], "traffic light": ["a", "b", "dog"]}
    stages = ConceptTextMasking(graph, ["the traffic light"] * 9, num_basic=2).stages
    assert stages["traffic light"] == 0
    assert stages["light"] > 0


# === Properties ===


def test_concepts_stay_or_leave_as_a_whole():
    caption = "a red dog runs under the traffic light on tree house"
    seen = set()
    for epoch, seed in itertools.product(range(5), range(100)):
        kept = mask(MASKING, caption, 8, seed, epoch)
        for first, second in (("traffic", "light"), ("tree", "house")):
            assert (first in kept) == (second in kept)
            seen.add((epoch, first, first in kept))
    # Both happens in the first stage, and in the last.
    for epoch in (0, 3, 4):
        assert len([each for each in seen if each[0] == epoch]) == 4


def test_the_longest_of_nested_concepts_counts():
    graph = {"light": ["traffic light"], "red traffic light": ["red"]}
    masking = ConceptTextMasking(graph, num_basic=1, num_stages=2).of_epoch(1)
    for seed in range(100):
        kept = mask(masking, "a dog on the red traffic light on the snow", 8, seed)
        count = sum(word in kept for word in ("red", "traffic", "light"))
        assert count in (0, 3)
        # At the end of a caption a longer concept may begin and not end.
        kept = mask(masking, "the red light runs on a red traffic", 8, seed)
        assert len(kept) == 6
    kept = {
        tuple(mask(masking, "a dog on the snow traffic light red", 6, s))
        for s in range(300)
    }
    assert {("traffic" in each) == ("light" in each) for each in kept} == {True}
    assert {("red" in each, "light" in each) for each in kept} == set(
        itertools.product((True, False), repeat=2)
    )


@pytest.mark.parametrize("epoch", range(3))
def test_words_that_may_not_leave_yet_stay_as_long_as_they_fit(epoch):
    members, left_out = MEMBERS[epoch], set()
    for seed, caption in enumerate(random_captions(300, 1)):
        words = caption.split()
        names = {tuple(name.split()) for name in MASKING.stages}
        units = [" ".join(words[a : b + 1]) for a, b in spans(words, names)]
        must_stay = [unit for unit in units if unit not in members]
        sizes = [sum(map(num_tokens, unit.split())) for unit in must_stay]
        kept = " ".join(mask(MASKING, caption, 10, seed, epoch))
        if sum(sizes) <= 8:
            for unit in {*must_stay}:
                assert kept.count(unit) >= must_stay.count(unit)
            left_out |= {unit for unit in units if unit not in kept}
        elif max(sizes, default=9) == 1 and LONG not in caption:
            # What may not leave is too long: nothing else stays.
            rest = iter(must_stay)
            assert all(word in rest for word in kept.split())
            assert len(kept.split()) == 8
    assert left_out <= members
    assert left_out


def test_too_many_words_that_may_not_leave_are_left_out_evenly():
    masking = ConceptTextMasking({"dog": ["cat"]}, num_basic=1)
    caption = "a dog the red dog blue runs on dog"
    counts = dict.fromkeys(caption.split(), 0)
    for seed in range(3000):
        for word in {*mask(masking, caption, 6, seed)}:
            counts[word] += 1
    # "cat" is basic, by name.
    assert masking.stages == {"cat": 0, "dog": 1}
    shares = [counts[word] / 3000 for word in ("a", "the", "red", "blue", "runs")]
    np.testing.assert_allclose(shares, 4 / 9, atol=0.04)
    masking = ConceptTextMasking({"dog": ["cat", "tree"]}, num_basic=1)
    kept = [mask(masking, caption, 6, seed) for seed in range(100)]
    assert not any("dog" in words for words in kept)
    assert len({*map(tuple, kept)}) > 10


def test_the_last_stage_is_random_masking_of_whole_concepts():
    single = ConceptTextMasking({"dog": ["cat", "red"], "red": ["snow"]})
    for seed, caption in enumerate(random_captions(100, 2)):
        expected = mask(RandomTextMasking(), caption, 8, seed)
        for epoch in (3, 4, 1000):
            assert mask(single, caption, 8, seed, epoch) == expected
    assert any(
        mask(single, caption, 8, 0) != mask(RandomTextMasking(), caption, 8, 0)
        for caption in random_captions(20, 2)
    )
    # A concept of three words is drawn as often as a word.
    masking, count = MASKING.of_epoch(3), np.zeros(7)
    caption = "a red traffic light the cat on snow runs"
    for seed in range(4000):
        kept = mask(masking, caption, 10, seed)
        units = ["a", "light", "the", "cat", "on", "snow", "runs"]
        count += [unit not in kept for unit in units]
    # Eight of nine tokens: one word leaves, or the whole concept and nothing else.
    np.testing.assert_allclose(count / 4000, 1 / 7, atol=0.03)


def test_a_concept_too_long_for_the_context_is_cut():
    masking = ConceptTextMasking({"rhododendron tree": ["dog"]})
    for epoch in range(4):
        for seed in range(10):
            row = masking.tokenize(
                TOKENIZERS[3], ["rhododendron tree"], [generator(seed)], [epoch]
            )
            np.testing.assert_array_equal(row, TOKENIZERS[3]([LONG]))


def test_captions_that_fit_are_not_masked():
    captions = ["", "a red dog", b"A  CAT &amp; a dog", "red traffic light house"]
    for epoch in range(4):
        rows = MASKING.tokenize(
            TOKENIZERS[10],
            captions,
            [generator(index) for index in range(4)],
            [epoch] * 4,
        )
        np.testing.assert_array_equal(rows, TOKENIZERS[10](captions))


def test_of_concepts_that_start_alike_the_longest_counts():
    graph = {"red": ["red traffic"], "red traffic light house": ["red traffic light"]}
    masking = ConceptTextMasking(graph, num_basic=1).of_epoch(3)
    caption, seen = "a red traffic light house on the tree", set()
    for seed in range(100):
        kept = mask(masking, caption, 8, seed)
        seen.add(tuple(kept))
    # Eight words of which six fit: two of four leave, or all four of the concept.
    whole = {each for each in seen if "red" in each}
    assert all({"red", "traffic", "light", "house"} <= {*each} for each in whole)
    assert len(whole) == 6
    assert seen - whole == {("a", "on", "the", "tree")}


def test_concepts_are_split_into_words_as_captions_are():
    graph = {"dog's house": ["tree"], "no. 42": ["dog"], "写真 röhre": ["dog"]}
    masking = ConceptTextMasking(graph)
    assert {"dog 's house", "no . 4 2", "写真 röhre"} <= {*masking.stages}
    seen = set()
    for seed in range(50):
        kept = mask(masking, "a dog's house on the red tree, blue cat", 8, seed, 3)
        assert ("'s" in kept) == ("house" in kept) == ("dog" in kept)
        seen.add("dog" in kept)
    assert seen == {True, False}


def test_the_stage_follows_from_the_epoch():
    masking = ConceptTextMasking(GRAPH, num_basic=NUM_BASIC, epochs_per_stage=3)
    stages = [masking.of_epoch(epoch).stage for epoch in range(14)]
    assert stages == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 5
    assert masking.stage is None
    # The stage of a masking that was chosen does not change any more.
    fixed = masking.of_epoch(4)
    assert fixed.of_epoch(100) is fixed
    assert "stage=1" in repr(fixed)
    caption = CAPTION
    assert mask(fixed, caption, 8, 1, 100) == mask(masking, caption, 8, 1, 4)
    # Without epochs, captions are those of the first.
    rows = masking.tokenize(TOKENIZERS[8], [caption], [generator(5)])
    assert TOKENIZERS[8].decode(rows[0]).split() == mask(masking, caption, 8, 5, 0)
    # Captions of several epochs together are as each alone.
    epochs = [0, 11, 4, 0, 7]
    rows = masking.tokenize(
        TOKENIZERS[8], [caption] * 5, [generator(5) for _ in epochs], epochs
    )
    for row, epoch in zip(rows, epochs):
        assert TOKENIZERS[8].decode(row).split() == mask(masking, caption, 8, 5, epoch)


def test_repr_names_what_decides_and_a_masking_pickles():
    captions = ["the light under a tree house"] * 3
    made = [
        MASKING,
        ConceptTextMasking(GRAPH, num_basic=1),
        ConceptTextMasking(GRAPH, captions, num_basic=2),
        ConceptTextMasking(GRAPH, num_basic=2, num_stages=5),
        ConceptTextMasking(GRAPH, num_basic=2, epochs_per_stage=2),
        ConceptTextMasking({**GRAPH, "runs": []}, num_basic=2),
        MASKING.of_epoch(0),
        MASKING.of_epoch(1),
    ]
    assert len({repr(each) for each in made}) == len(made)
    for masking in made:
        copy = pickle.loads(pickle.dumps(masking))
        assert repr(copy) == repr(masking)
        for epoch, caption in enumerate(random_captions(5, 3)):
            expected = mask(masking, caption, 8, 0, epoch)
            assert mask(copy, caption, 8, 0, epoch) == expected


def test_integers_of_numpy_are_as_those_of_python():
    names = ["num_basic", "num_stages", "epochs_per_stage"]
    found, expected = (
        ConceptTextMasking(GRAPH, **dict.fromkeys(names, value))
        for value in (np.int64(2), 2)
    )
    assert repr(found) == repr(expected)


# === Co-occurrence ===


def test_words_are_related_if_they_occur_together_more_than_by_chance():
    captions = [" ".join(caption.split()[:5]) for caption in random_captions(200, 4)]
    captions += ["dog cat"] * 50 + ["tree snow"] * 50 + ["a dog, a dog"] * 2
    has = {
        word: np.array([word in c.replace(",", " ,").split() for c in captions])
        for word in [*WORDS, LONG, ","]
    }
    expected = {
        word: sorted(
            other
            for other in has
            if other != word
            and (has[word] & has[other]).sum() >= 10
            # Pointwise mutual information above zero.
            and np.log((has[word] & has[other]).mean())
            - np.log(has[word].mean())
            - np.log(has[other].mean())
            > 1e-9
        )
        for word in has
    }
    expected = {word: others for word, others in expected.items() if others}
    assert co_occurrence_graph(iter(captions)) == expected
    assert "cat" in expected["dog"]
    assert sum(map(len, expected.values())) > 10
    # Pairs must be frequent, too, and not only their words.
    rare = ["dog cat"] * 2 + ["dog", "cat"] * 2 + ["tree snow"] * 20
    assert {*co_occurrence_graph(rare, 2)} == {"dog", "cat", "tree", "snow"}
    assert {*co_occurrence_graph(rare, 3)} == {"tree", "snow"}
    # Twice in one caption is once.
    assert co_occurrence_graph(captions, 2)[","] == ["a", "dog"]
    assert "," not in co_occurrence_graph(captions, 3)


def test_a_graph_of_captions_makes_a_masking():
    captions = [*random_captions(300, 5)]
    graph = co_occurrence_graph(captions)
    stages = ConceptTextMasking(graph, captions).stages
    assert {*stages} == {*graph} <= {*WORDS, LONG}
    assert sum(not stage for stage in stages.values()) == 2


def test_any_words_of_captions_make_a_graph():
    """Words that are split from longer text, and would be changed as a text."""
    captions = ["a dog_house, â€™ it's __ &amp;amp; é 7%", "Ã© ._ Ẑ 'south İ"] * 12
    captions = [*captions, *["a cat"] * 30]
    graph = co_occurrence_graph(captions)
    assert {"_", "__", "'s", "&", "7"} <= {*graph}
    assert {*ConceptTextMasking(graph, captions).stages} == {*graph}


# === In a dataset ===


@pytest.fixture
def shard(write_tar, noise):
    members = []
    for index, caption in enumerate(random_captions(20, 6)):
        members += [
            (f"{index:02}.png", noise(index)),
            (f"{index:02}.txt", caption.encode()),
        ]
    return write_tar("texts.tar", members)


def make(source, masking=MASKING, **options):
    arguments = {"tokenizer": TOKENIZERS[8], "format": "grain", "training": True}
    return image_text_dataset(
        source,
        image_size=16,
        batch_size=16,
        text_masking=masking,
        **arguments | options,
    )


def take(dataset, count):
    iterator = iter(dataset)
    rows = [batch["token_ids"] for batch in itertools.islice(iterator, count)]
    iterator.close()
    return np.array(rows)


def test_each_epoch_of_a_dataset_has_its_stage(shard):
    """A batch of 16 of 20 samples is of one or two epochs."""
    rows = take(make(shard), 8).reshape(-1, 8)
    fixed = [take(make(shard, MASKING.of_epoch(n)), 8).reshape(-1, 8) for n in range(4)]
    for epoch in range(6):
        here = slice(20 * epoch, 20 * epoch + 20)
        np.testing.assert_array_equal(rows[here], fixed[min(epoch, 3)][here])
    for first, second in itertools.pairwise(fixed):
        assert (first != second).any(axis=1).mean() > 0.1


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(shard, processes):
    whole = take(make(shard), 7)
    shares = [take(make(shard, process=(i, processes)), 7) for i in range(processes)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)


@pytest.mark.parametrize("format", ["grain", "tf"])
def test_a_resumed_dataset_has_the_stages_of_one_that_was_not_stopped(shard, format):
    if format == "tf":
        pytest.importorskip("tensorflow")
    whole = take(make(shard), 8)
    for start in (1, 3, 6):
        dataset = make(shard, format=format)
        dataset.stream.start = start
        rows = [b["token_ids"] for b in itertools.islice(iter(dataset), 2)]
        np.testing.assert_array_equal(np.array(rows), whole[start : start + 2])


def test_epochs_of_a_sampler_and_of_mixed_sources_have_their_stages(shard):
    lengths = [20, 16, 12, 20]

    def sampling(number, epoch):
        return np.arange(number)[: lengths[min(epoch, 3)]]

    for source, options, ends in [
        (shard, {"sampling": sampling}, np.cumsum(lengths)),
        ({str(shard): 1.0}, {}, np.arange(20, 100, 20)),
    ]:
        rows = take(make(source, **options), 5).reshape(-1, 8)
        for stage in range(4):
            here = slice(([0, *ends])[stage], ends[stage])
            fixed = make(source, MASKING.of_epoch(stage), **options)
            expected = take(fixed, 5).reshape(-1, 8)[here]
            np.testing.assert_array_equal(rows[here], expected)


def test_evaluation_is_not_masked_and_the_description_names_the_masking(shard):
    dataset = make(shard, training=False)
    for batch in dataset:
        assert batch["token_ids"].shape[1] == 8
    captions = read_captions(shard)
    rows = np.concatenate([batch["token_ids"] for batch in dataset])
    np.testing.assert_array_equal(rows, TOKENIZERS[8](captions))
    assert dataset.description["data.text_masking"] is None
    other = ConceptTextMasking(GRAPH, num_basic=NUM_BASIC, epochs_per_stage=2)
    described = [
        make(shard, m).description["data.text_masking"] for m in (MASKING, other)
    ]
    assert described == [repr(MASKING), repr(other)]


@pytest.mark.slow
def test_batches_do_not_depend_on_workers(shard, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import itertools, sys
import numpy as np
from keras_cluster_mask.data import *


def make(workers, start):
    tokenizer = CLIPTokenizer.train([{CAPTION!r}] * 5, 600, 8)
    dataset = image_text_dataset(
        sys.argv[1], tokenizer, 16, 16, True, format="grain", num_workers=workers,
        text_masking=ConceptTextMasking({GRAPH!r}, num_basic={NUM_BASIC}),
    )
    dataset.start = start
    return dataset


if __name__ == "__main__":
    for workers, start in ((0, 0), (1, 0), (2, 0), (2, 3)):
        iterator = iter(make(workers, start))
        rows = [batch["token_ids"] for batch in itertools.islice(iterator, 7 - start)]
        iterator.close()
        if not workers:
            whole = rows
        np.testing.assert_array_equal(rows, whole[start:])
    print("equal")
"""
    )
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(program), str(shard)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout == "equal\n", done.stderr


# === Errors ===


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({}, "`graph` must be a dict.*at least one relation.*Received: graph={}"),
        (["dog", "cat"], "`graph` must be a dict.*Received: graph="),
        ({"dog": [], "cat": []}, "`graph` must have relations.*2 concepts without edg"),
        ({"dog": ["dog"]}, "`graph` must have relations.*1 concepts without edges"),
        ({"dog": "cat"}, "`graph`.*iterables.*Received: 'dog': 'cat'"),
        ({"dog": 3}, "`graph`.*iterables.*Received: 'dog': 3"),
        ({"Dog": ["cat"]}, "`graph`.*lower case.*a graph with 'Dog'"),
        ({"dog": ["Cat"]}, "`graph`.*lower case.*a graph with 'Cat'"),
        (
            {"traffic_light": ["dog"]},
            "underscores.*a graph with 'traffic_light'",
        ),
        ({"": ["dog"]}, "`graph`.*one to four words.*a graph with ''"),
        ({"a b c d e": ["dog"]}, "`graph`.*four words.*a graph with 'a b c d e'"),
        ({"dog": ["20051"]}, "`graph`.*four words.*a graph with '20051'"),
        ({" dog": ["cat"]}, "`graph`.*a graph with ' dog'"),
        ({"dog": [7]}, "`graph`.*a graph with 7"),
        ({"dog": [["cat"]]}, r"`graph`.*a graph with \['cat'\]"),
        ({b"dog": ["cat"]}, "`graph`.*a graph with b'dog'"),
    ],
)
def test_a_graph_without_concepts_or_relations_is_refused(graph, message):
    with pytest.raises(ValueError, match=message):
        ConceptTextMasking(graph)


@pytest.mark.parametrize("name", ["num_basic", "num_stages", "epochs_per_stage"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_numbers_must_be_positive_integers(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must.*Received: {name}={value!r}"):
        ConceptTextMasking(GRAPH, **{name: value})


def test_one_stage_is_refused():
    with pytest.raises(ValueError, match=r"`num_stages`.*at least 2.*num_stages=1"):
        ConceptTextMasking(GRAPH, num_stages=1)


def test_stages_that_do_not_grow_are_refused():
    message = r"`graph` must relate.*`num_basic`.*Received: 2 concepts, 2 of them basic"
    with pytest.raises(ValueError, match=message):
        ConceptTextMasking({"dog": ["cat"]}, num_basic=2)
    masking = ConceptTextMasking({"dog": ["cat"]}, num_basic=2, num_stages=2)
    assert masking.stages == {"dog": 0, "cat": 0}


def test_captions_without_basic_concepts_are_refused():
    message = r"`captions` must hold.*Received: 4 words, and none of \['dog'"
    with pytest.raises(ValueError, match=message):
        ConceptTextMasking(GRAPH, ["a red boat", "house"], num_basic=1)
    with pytest.raises(ValueError, match=r"`captions`.*Received: 0 words"):
        ConceptTextMasking(GRAPH, [])
    with pytest.raises(ValueError, match=r"`captions`.*Received: captions='a dog'"):
        ConceptTextMasking(GRAPH, "a dog")


@pytest.mark.parametrize("captions", [7, None, [7], [None]])
def test_captions_that_are_no_iterable_of_str_are_refused(captions):
    functions = [co_occurrence_graph]
    if captions is not None:
        functions.append(functools.partial(ConceptTextMasking, GRAPH))
    for function in functions:
        with pytest.raises(
            (TypeError, ValueError), match=r"`captions` must.*Received:"
        ):
            function(captions)


def test_captions_without_related_words_are_refused():
    message = r"`captions` must.*Received: min_count=10, 5 captions with 0 words"
    with pytest.raises(ValueError, match=message):
        co_occurrence_graph(["a dog"] * 5)
    # Words of all captions are independent.
    with pytest.raises(ValueError, match=r"`captions`.*20 captions with 2 words"):
        co_occurrence_graph(["a dog"] * 20)
    with pytest.raises(ValueError, match=r"`captions`.*Received: captions='a dog'"):
        co_occurrence_graph("a dog")
    with pytest.raises(ValueError, match=r"`min_count`.*Received: min_count=0"):
        co_occurrence_graph(["a dog"] * 20, min_count=0)
