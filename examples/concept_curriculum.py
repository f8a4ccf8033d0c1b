"""Trains CLIP on short texts that drop basic concepts first (after CCM).

Concept-based curriculum masking (CCM) is a method for masked language models, which
predict masked words. A contrastive model does not predict words: here, a masked concept
is dropped from the caption. We know of no measurements of this adaptation.

A concept is one to four words that are kept or dropped together. Training has stages:

- In the first stage, only basic concepts can be dropped: the concepts with the most
  neighbors in a graph of related concepts, if they occur often enough in the captions.
- In each later stage, the neighbors of these concepts can also be dropped.
- In the last stage, every concept and every other word can be dropped.

In a caption that is too long, words that cannot be dropped yet are kept first, and
random other words fill the context. `--graph` is a JSON file with a dictionary from
concepts to lists of related concepts, such as those of ConceptNet, in lower case.
Without it, the program relates words that occur together more often than by chance.

Efficient Pre-training of Masked Language Model via Concept-based Curriculum Masking:
https://arxiv.org/abs/2212.07617
"""

import argparse
import collections
import copy
import hashlib
import itertools
import json
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", "tensorflow"
import keras

import keras_cluster_mask as kcm

MAX_WORDS = 4
# The candidates for basic concepts are 5 / 3 as many concepts with the highest degree.
# Each must be more than this share of the words: 100,000 of BERT's 3.3 billion words.
POOL, MIN_SHARE = 5 / 3, 3e-5


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description="Trains CLIP on texts that drop basic concepts first (CCM).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    images = kcm.data.example_images() / "train-*.tar"
    add("--train", default=images, help="shards to train on")
    add("--graph", type=pathlib.Path, help="a JSON file of related concepts")
    add("--min-count", type=int, default=10, help="of words and pairs, without --graph")
    add("--num-basic", type=int, default=3000, help="concepts, at most")
    add("--num-stages", type=int, default=4, help="of the curriculum")

    add("--context-length", type=int, default=8, help="in tokens")
    add("--image-size", type=int, default=48, help="in pixels")
    add("--batch-size", type=int, default=64, help="over all devices together")
    add("--epochs", type=int, default=8, help="each stage has the same number")
    return parser.parse_args(arguments)


# === The graph and its stages ===


def read_graph(path):
    """Returns a dict from each concept to its set of neighbors, in both directions."""
    graph = collections.defaultdict(set)
    for name, related in json.loads(path.read_text(encoding="utf-8")).items():
        for other in {*related} - {name}:
            graph[name].add(other)
            graph[other].add(name)
    return graph


def co_occurrence_graph(captions, min_count):
    """Returns a graph of words with a positive pointwise mutual information."""
    texts = [{*words} for words in captions]
    counts = collections.Counter(itertools.chain(*texts))
    frequent = {word for word, count in counts.items() if count >= min_count}
    pairs = collections.Counter()
    for words in texts:
        pairs.update(itertools.combinations(sorted(words & frequent), 2))
    graph = collections.defaultdict(set)
    for (first, second), count in pairs.items():
        # The probability of both is above the product of the probabilities of each.
        if count >= min_count and count * len(texts) > counts[first] * counts[second]:
            graph[first].add(second)
            graph[second].add(first)
    return graph


def spans_of(words, concepts):
    """Returns the start and the end of each concept, and of each other word.

    If several concepts start at the same word, the longest is used.
    """
    spans, first = [], 0
    while first < len(words):
        end = min(first + MAX_WORDS, len(words))
        while end > first + 1 and " ".join(words[first:end]) not in concepts:
            end -= 1
        spans.append((first, end))
        first = end
    return spans


def find_stages(graph, captions, num_basic, num_stages):
    """Returns a dict from each concept to the first stage, from 0, that can drop it."""
    counts = collections.Counter(
        " ".join(words[first:end])
        for words in captions
        for first, end in spans_of(words, graph)
    )
    least = MIN_SHARE * sum(map(len, captions))
    # By name where degrees are equal.
    ranked = sorted(graph, key=lambda name: (-len(graph[name]), name))
    pool = ranked[: round(num_basic * POOL)]
    new = [name for name in pool if counts[name] > least][:num_basic]
    stages = dict.fromkeys(graph, num_stages - 1)
    for stage in range(num_stages - 1):
        stages.update(dict.fromkeys(new, stage))
        new = {other for name in new for other in graph[name] if stages[other] > stage}
    return stages


# === The masking ===


class ConceptTextMasking(kcm.data.TextMasking):
    """Drops whole concepts, at first only basic concepts.

    Args:
        stages: dict from concepts to the first stage that can drop each concept.
        num_stages: int.
        epochs_per_stage: int. The last stage lasts until the end of training.
    """

    def __init__(self, stages, num_stages, epochs_per_stage):
        self.stages, self.stage = stages, 0
        self.num_stages, self.epochs_per_stage = num_stages, epochs_per_stage

    def of_epoch(self, epoch):
        masking = copy.copy(self)
        masking.stage = min(epoch // self.epochs_per_stage, self.num_stages - 1)
        return masking

    def keep_words(self, caption):
        spans = spans_of(caption.words, self.stages)
        names = [" ".join(caption.words[first:end]) for first, end in spans]
        sizes = [sum(caption.num_tokens[first:end]) for first, end in spans]
        kept = super().keep_words(caption._replace(words=names, num_tokens=sizes))
        return [place for each in kept for place in range(*spans[each])]

    def score(self, caption):
        # The last stage can drop a word outside all concepts.
        stages = [self.stages.get(word, self.num_stages - 1) for word in caption.words]
        draws = caption.generator.random(len(caption.words)).tolist()
        return [draw + (stage > self.stage) for draw, stage in zip(draws, stages)]

    def __repr__(self):
        content = json.dumps(sorted(self.stages.items())).encode()
        return (
            f"ConceptTextMasking({hashlib.sha256(content).hexdigest()}, "
            f"{self.num_stages}, {self.epochs_per_stage})"
        )


def main(args):
    captions = kcm.data.read_captions(args.train)
    words = [kcm.data.TextMasking.split(caption) for caption in captions]
    graph = (
        read_graph(args.graph)
        if args.graph
        else co_occurrence_graph(words, args.min_count)
    )
    # Of a small graph, a tenth of the concepts is basic.
    num_basic = min(args.num_basic, -(-len(graph) // 10))
    stages = find_stages(graph, words, num_basic, args.num_stages)
    if 0 not in stages.values():
        raise SystemExit("No concept is basic: check the graph and --num-basic.")
    counts = sorted(collections.Counter(stages.values()).items())
    print("New concepts of each stage:", dict(counts))
    epochs_per_stage = max(args.epochs // args.num_stages, 1)
    text_masking = ConceptTextMasking(stages, args.num_stages, epochs_per_stage)
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 3000, args.context_length)
    dataset = kcm.data.image_text_dataset(
        args.train,
        tokenizer,
        args.image_size,
        args.batch_size,
        training=True,
        text_masking=text_masking,
    )
    backbone = kcm.models.clip_backbone(
        "tiny", args.image_size, tokenizer.vocabulary_size, tokenizer.context_length
    )
    masking = kcm.ClusterMasking(patch_size=8)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    model.compile(keras.optimizers.AdamW(1e-3))
    model.fit(dataset, epochs=args.epochs)
    return model


if __name__ == "__main__":
    main(parse())
