"""Which words of long captions stay, by a graph of concepts and the epoch."""

import collections
import copy
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.data import byte_pairs
from keras_cluster_mask.data.text_masking import TextMasking

# Concepts of more words are not used by the source.
MAX_WORDS = 4
# The source takes 3,000 of the 5,000 concepts of the highest degree, those seen more
# than 100,000 times. That is this share of the 3.3 billion words that BERT reads.
NUM_BASIC, POOL, MIN_SHARE = 3000, 5 / 3, 3e-5
# Of a small graph, one of so many concepts is basic.
CONCEPTS_PER_BASIC = 10


class ConceptTextMasking(TextMasking):
    """Leaves out basic concepts first, and related ones in later epochs (after CCM).

    This is an adaptation. Concept-based curriculum masking (CCM) is a method for masked
    language models, which predict what is left out. A contrastive model predicts no
    word: here a concept that is masked leaves the caption. We know of no measurement of
    this for CLIP.

    A concept is one to four words that are kept or dropped together. Training has
    stages:

    - In the first, only basic concepts may be dropped: those with the most neighbors in
      `graph` that occur often enough in `captions`.
    - In each later stage, the neighbors of these concepts may be dropped, too.
    - In the last, every concept and every other word may be dropped. It lasts to the
      end of training; CCM starts again from the first stage.

    In a caption that is too long, words that may not be dropped yet are kept first, and
    random other words fill the context. If the former alone do not fit, a random part
    of them is kept. A word outside all concepts can be dropped in the last stage only.
    If several concepts start at the same word, the longest is used.

    An epoch is a pass over the samples of the dataset, whatever `steps_per_epoch` is.

    Example:

    ```python
    graph = {"dog": ["snow", "traffic light"], "snow": ["winter coat"]}
    captions = ["a dog in a winter coat runs to the traffic light in the snow"] * 2
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 700, context_length=12)
    masking = kcm.data.ConceptTextMasking(graph, captions)
    print(masking.stages)  # "dog" or "snow" is 0
    for epoch in range(4):
        generator = np.random.default_rng(0)
        ids = masking.tokenize(tokenizer, captions[:1], [generator], [epoch])
        print(tokenizer.decode(ids[0]))  # whole concepts, other ones in each epoch
    ```

    Args:
        graph: dict from concepts to iterables of related concepts, str, such as those
            of the assertions of ConceptNet. Relations have no direction. A concept has
            one to four words, as CLIP's tokenizer splits captions, in lower case:
            `"traffic light"`. `co_occurrence_graph` makes a stand-in from captions.
        captions: Iterable of str or bytes, those of the training data. A basic concept
            makes up more than 3e-5 of their words, as in CCM. Defaults to `None`: the
            neighbors alone count.
        num_basic: int. The maximum number of basic concepts. They are of the
            `num_basic * 5 / 3` concepts with the most neighbors, as in CCM. Defaults
            to `None`: 3,000, or a tenth of the concepts of the graph if that is less.
        num_stages: int, at least 2. Defaults to `4`, as in CCM.
        epochs_per_stage: int. The number of epochs of each stage but the last. Defaults
            to `1`; a quarter of all epochs gives each of four stages the same time, as
            in CCM.

    Attributes:
        stages: dict from each concept to the first stage, from 0, in which it may
            leave.
        stage: int, or None for a masking that changes with the epoch. `of_epoch`
            returns one that stays in its stage.

    Raises:
        ValueError: If an argument is invalid, if the graph has no relations, if no
            concept is basic, or if all stages but the last would be equal.

    Reference:

    - [Efficient Pre-training of Masked Language Model via Concept-based Curriculum
      Masking](https://arxiv.org/abs/2212.07617)
    """

    def __init__(
        self,
        graph: Mapping[str, Iterable[str]],
        captions: Iterable[str | bytes] | None = None,
        num_basic: int | None = None,
        num_stages: int = 4,
        epochs_per_stage: int = 1,
    ):
        num_stages = self.num_stages = check_integer("num_stages", num_stages, 2)
        self.epochs_per_stage = check_integer("epochs_per_stage", epochs_per_stage, 1)
        if num_basic is not None:
            num_basic = check_integer("num_basic", num_basic, 1)
        neighbors = _neighbors(graph)
        self.stage = None
        self.stages = dict.fromkeys(neighbors, num_stages - 1)
        # From the first word of concepts of several words to the length of the longest.
        self._longest = {}
        for words in map(str.split, neighbors):
            if len(words) > 1:
                longest = max(self._longest.get(words[0], 0), len(words))
                self._longest[words[0]] = longest
        basic = self._basic(neighbors, captions, num_basic)
        for stage, concepts in enumerate(_growing(basic, neighbors, num_stages - 1)):
            self.stages.update(dict.fromkeys(concepts, stage))
        first_stages = {*self.stages.values()} - {num_stages - 1}
        if num_stages > 2 and first_stages == {0}:
            raise ValueError(
                "`graph` must relate basic concepts to others, or all stages but the "
                "last are equal: pass a lower `num_basic`, or `num_stages=2`. Received:"
                f" {len(neighbors)} concepts, {len(basic)} of them basic, without "
                f"other neighbors; num_basic={num_basic}, num_stages={num_stages}"
            )

    def _basic(self, neighbors, captions, num_basic):
        """The concepts of the first stage, a list."""
        tenth = -(-len(neighbors) // CONCEPTS_PER_BASIC)
        number = num_basic or min(NUM_BASIC, tenth)
        # By name where degrees are equal, so that the order of the graph has no effect.
        ranked = sorted(neighbors, key=lambda name: (-len(neighbors[name]), name))
        pool = ranked[: int(number * POOL + 0.5)]
        if captions is not None:
            counts, total = collections.Counter(), 0
            for caption in byte_pairs.clean_all(captions):
                words = byte_pairs.words_of(caption)
                counts.update(self._units(words)[0])
                total += len(words)
            pool = [name for name in pool if counts[name] > MIN_SHARE * total]
            if not pool:
                raise ValueError(
                    "`captions` must hold concepts with many neighbors in `graph`, as "
                    "CLIP's tokenizer splits words, or no concept is basic: check the "
                    "spelling, pass a higher `num_basic`, or use "
                    f"`co_occurrence_graph(captions)`. Received: {total} words, and "
                    f"none of {ranked[:5]}... among them more than "
                    f"{MIN_SHARE * total:.3g} times"
                )
        return pool[:number]

    def _units(self, words):
        """The concepts and other words of a caption, and where each starts.

        Both are sequences; the second also has the end of the last.
        """
        if not self._longest:
            return words, range(len(words) + 1)
        names, starts, start = [], [], 0
        while start < len(words):
            starts.append(start)
            name, after = words[start], start + 1
            if longest := self._longest.get(name):
                for end in range(min(start + longest, len(words)), after, -1):
                    joined = " ".join(words[start:end])
                    if joined in self.stages:
                        name, after = joined, end
                        break
            names.append(name)
            start = after
        return names, [*starts, start]

    def of_epoch(self, epoch: int) -> TextMasking:
        """The masking of an epoch, which stays in its stage; see `TextMasking`."""
        if self.stage is not None:
            return self
        masking = copy.copy(self)
        masking.stage = min(epoch // self.epochs_per_stage, self.num_stages - 1)
        return masking

    def keep_words(
        self,
        words: Sequence[str],
        num_tokens: Sequence[int],
        num_tokens_left: int,
        generator: np.random.Generator,
    ) -> list[int]:
        """The words of the concepts that stay; see `TextMasking.keep_words`."""
        names, starts = self._units(words)
        if len(names) == len(words):
            return super().keep_words(words, num_tokens, num_tokens_left, generator)
        before = [0, *itertools.accumulate(num_tokens)]
        sizes = [
            before[end] - before[first] for first, end in itertools.pairwise(starts)
        ]
        kept = super().keep_words(names, sizes, num_tokens_left, generator)
        return [
            index for each in kept for index in range(starts[each], starts[each + 1])
        ]

    def score(
        self,
        words: Sequence[str],
        num_tokens: Sequence[int],
        num_tokens_left: int,
        generator: np.random.Generator,
    ) -> Sequence[float]:
        """Random scores of concepts and words, higher for those that may not leave.

        See `TextMasking.score`; the words of a concept are one, joined by spaces.
        """
        stage, last = self.stage or 0, self.num_stages - 1
        draws = generator.random(len(words)).tolist()
        first = [self.stages.get(word, last) for word in words]
        return [draw + (when > stage) for draw, when in zip(draws, first)]

    def __repr__(self):
        content = json.dumps(sorted(self.stages.items())).encode()
        digest = hashlib.sha256(content).hexdigest()[:16]
        stage = "" if self.stage is None else f", stage={self.stage}"
        return (
            f"ConceptTextMasking(graph=<{len(self.stages)} concepts, {digest}>, "
            f"num_stages={self.num_stages}, epochs_per_stage={self.epochs_per_stage}"
            f"{stage})"
        )


def co_occurrence_graph(
    captions: Iterable[str | bytes], min_count: int = 10
) -> dict[str, list[str]]:
    """A graph of words that occur together, for `ConceptTextMasking`.

    It is a stand-in for a graph of knowledge such as ConceptNet: two words are related
    if captions hold both more often than if they were independent, a positive pointwise
    mutual information. Frequent words have the most neighbors, "a" and "the" among
    them, and the second stage has almost all words of the graph.

    The time and memory grow with the number of pairs of words. Of millions of captions,
    a sample is enough.

    Example:

    ```python
    captions = ["a dog in the snow", "a dog in the park", "a red boat", "a red bus"]
    graph = kcm.data.co_occurrence_graph(captions, min_count=2)
    print(graph["dog"])  # ['in', 'the']
    masking = kcm.data.ConceptTextMasking(graph, captions)
    ```

    Args:
        captions: Iterable of str or bytes.
        min_count: int. Words, and pairs of words, are in at least so many captions.
            Defaults to `10`.

    Returns:
        dict from each word that is related to another to the sorted list of those.

    Raises:
        ValueError: If an argument is invalid, or if no words are related.
    """
    check_integer("min_count", min_count, 1)
    texts = [{*byte_pairs.words_of(text)} for text in byte_pairs.clean_all(captions)]
    counts = collections.Counter(itertools.chain(*texts))
    frequent = {word for word, count in counts.items() if count >= min_count}
    pairs = collections.Counter()
    for words in texts:
        pairs.update(itertools.combinations(sorted(words & frequent), 2))
    graph = collections.defaultdict(list)
    for (first, second), count in pairs.items():
        # The probability of both is above the product of the probabilities of each.
        is_related = count * len(texts) > counts[first] * counts[second]
        if count >= min_count and is_related:
            graph[first].append(second)
            graph[second].append(first)
    if not graph:
        raise ValueError(
            "`captions` must hold pairs of words that occur together in at least "
            "`min_count` captions, and more often than by chance: pass more captions, "
            f"or a lower `min_count`. Received: min_count={min_count}, {len(texts)} "
            f"captions with {len(frequent)} words that are frequent enough"
        )
    return {word: sorted(graph[word]) for word in sorted(graph)}


def _growing(basic, neighbors, number):
    """Yields the concepts that each of some stages adds to those before."""
    known, new = set(), {*basic}
    for _ in range(number):
        known |= new
        yield new
        new = {other for name in new for other in neighbors[name]} - known


def _neighbors(graph):
    """A graph as a dict from each concept to the set of its neighbors, both ways."""
    if not isinstance(graph, Mapping) or not graph:
        raise ValueError(
            "`graph` must be a dict from concepts to iterables of related concepts, "
            f"with at least one relation. Received: graph={graph!r}"
        )
    neighbors, names = collections.defaultdict(set), {}

    def name_of(concept):
        # What is no str may not be hashable.
        name = names.get(concept) if isinstance(concept, str) else None
        if name is None:
            name = names[concept] = _name(concept)
        return name

    for concept, related in graph.items():
        if isinstance(related, str | bytes) or not isinstance(related, Iterable):
            raise ValueError(
                "`graph` must have iterables of concepts as values, such as lists. "
                f"Received: {concept!r}: {related!r}"
            )
        name = name_of(concept)
        # A concept without neighbors is one nevertheless, whose words stay together.
        mine = neighbors[name]
        for other in map(name_of, related):
            if other != name:
                mine.add(other)
                neighbors[other].add(name)
    if not any(neighbors.values()):
        raise ValueError(
            "`graph` must have relations between concepts. Received: a graph of "
            f"{len(neighbors)} concepts without edges"
        )
    return dict(neighbors)


def _name(concept):
    """The words of a concept, joined by spaces."""
    is_lower = isinstance(concept, str) and concept == concept.lower()
    words = byte_pairs.words_of(concept) if is_lower else []
    if words == [concept]:
        return concept
    is_clean = is_lower and concept == byte_pairs.clean(concept)
    if not is_clean or not 1 <= len(words) <= MAX_WORDS or "_" in concept:
        raise ValueError(
            "`graph` must have concepts of one to four words, as CLIP's tokenizer "
            "splits captions, in lower case and with spaces in place of underscores: "
            f"leave others out. Received: a graph with {concept!r}"
        )
    return " ".join(words)
