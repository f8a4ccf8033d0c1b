"""Trains CLIP on the pairs whose captions have the fewest frequent words (WFPP).

The score of a caption is `(1 - product of p(w)) / n` over its first 30 words, `n` of
them. `p(w) = 1 - sqrt(threshold / f(w))` grows with the share `f(w)` of the word among
all words. It is 1 up to a share of `threshold`, so that misspelled words do not count.
The pairs of the highest scores stay, the same in each epoch; among them are many short
captions. The last epochs train on all pairs.

Enhancing Vision-Language Model Pre-training with Image-text Pair Pruning Based on Word
Frequency: https://arxiv.org/abs/2410.10879
"""

import argparse
import collections
import math
import tarfile

import keras
import numpy as np

import keras_cluster_mask as kcm

# The first words of a caption, which the score is computed from.
NUM_WORDS = 30


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description="Trains CLIP on captions with few frequent words (WFPP).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    images = kcm.data.example_images() / "train-*.tar"
    add("--train", default=images, help="tar shards")
    add("--share", type=float, default=0.5, help="of the pairs that stay")
    add("--threshold", type=float, default=1e-7, help="a share of all words")

    add("--image-size", type=int, default=48, help="in pixels")
    add("--batch-size", type=int, default=64, help="over all devices together")
    add("--epochs", type=int, default=8, help="on the pairs that stay")
    add("--tuning-epochs", type=int, default=1, help="on all pairs, afterwards")
    return parser.parse_args(arguments)


def read_captions(source):
    """A dict from the key of each sample of tar shards to its caption.

    Metadata are read much faster than shards: img2dataset writes a Parquet file with
    the columns `key` and `caption` beside each of them.
    """
    captions = {}
    for shard in kcm.data.list_shards(source):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, field = member.name.removeprefix("./").partition(".")
                if field == "txt":
                    captions[key] = archive.extractfile(member).read()
    return captions


def scores(captions, threshold):
    """The scores of captions, as an array."""
    captions = [kcm.data.TextMasking.split(caption) for caption in captions]
    counts = collections.Counter(word for words in captions for word in words)
    total = counts.total()

    def probability(word):
        p = 1 - math.sqrt(threshold * total / counts[word])
        return p if p > 0 else 1.0

    heads = [words[:NUM_WORDS] for words in captions]
    # A caption without words has the lowest score, 0.
    return np.array(
        [(1 - math.prod(map(probability, head))) / max(len(head), 1) for head in heads]
    )


def choose(captions, share, threshold):
    """The keys of the pairs that stay; of equal scores, the first."""
    ranked = np.argsort(-scores(captions.values(), threshold), kind="stable")
    keys = list(captions)
    number = max(int(share * len(keys) + 1e-6), 1)
    return [keys[place] for place in ranked[:number]]


def main(args):
    captions = read_captions(args.train)
    kept = choose(captions, args.share, args.threshold)
    print(f"{len(kept)} of {len(captions)} pairs stay.")
    tokenizer = kcm.data.CLIPTokenizer.train(captions.values(), 3000, context_length=16)

    def dataset(sampling=None):
        return kcm.data.image_text_dataset(
            args.train,
            tokenizer,
            args.image_size,
            args.batch_size,
            training=True,
            sampling=sampling,
        )

    backbone = kcm.models.clip_backbone(
        "tiny", args.image_size, tokenizer.vocabulary_size, tokenizer.context_length
    )
    masking = kcm.ClusterMasking(patch_size=8)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    model.compile(keras.optimizers.AdamW(1e-3))
    model.fit(dataset(kcm.data.Sampling(kept)), epochs=args.epochs)
    last = args.epochs + args.tuning_epochs
    model.fit(dataset(), initial_epoch=args.epochs, epochs=last)
    return model


if __name__ == "__main__":
    main(parse())
