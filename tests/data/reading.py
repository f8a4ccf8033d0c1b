"""How tests read a dataset, and texts for tokenizers."""

import itertools
import json
import random
import unicodedata

import numpy as np
import pytest

from keras_cluster_mask.data import (
    CLIPTokenizer,
    example_images,
    image_text_dataset,
    read_captions,
)
from keras_cluster_mask.data.paths import open_source
from keras_cluster_mask.data.samples import Fault, Fields, read_named_files
from keras_cluster_mask.data.sources import read_items

# Of the captions that the fixture `write_pairs` writes.
TOKENIZER = CLIPTokenizer.train([f"no {i}" for i in range(200)], 600, context_length=9)


def take(dataset, count=None):
    """The first batches, or all, as dicts of NumPy arrays."""
    iterator = iter(dataset)
    batches = [
        {name: np.asarray(value) for name, value in batch.items()}
        for batch in itertools.islice(iterator, count)
    ]
    # That of a `tf.data.Dataset` closes itself.
    if hasattr(iterator, "close"):
        iterator.close()
    return batches


def column(batches, name):
    return [value for batch in batches for value in batch[name]]


def take_from_tensorflow(dataset, count):
    """Batches of the `tf.data.Dataset`, with keys as str: its strings are bytes."""
    batches = take(dataset.as_dataset(), count)
    for batch in batches:
        batch["keys"] = np.array([key.decode() for key in batch["keys"]], object)
    return batches


def keys(dataset, count=None):
    return column(take(dataset, count), "keys")


def batches(dataset, first, last):
    """The keys of the batches with these numbers."""
    dataset.start = first
    read = take(dataset, last - first)
    return [[*batch["keys"]] for batch in read]


def together(parts):
    """The keys that all processes read, batch by batch."""
    assert len({len(part) for part in parts}) == 1
    # All have as many rows of each batch.
    for batch in zip(*parts):
        assert len({len(keys) for keys in batch}) == 1
    return [key for batch in zip(*parts) for keys in batch for key in keys]


def pairs_of(images):
    """The files of a tar shard: images, each with a caption."""
    files = []
    for number, image in enumerate(images):
        files += [(f"{number:02}.png", image), (f"{number:02}.txt", b"t")]
    return files


def lengths(captions):
    """A tokenizer of rows of one number, the length of the caption, which is a str."""
    assert {type(caption) for caption in captions} == {str}
    return [[len(caption)] for caption in captions]


def make_dataset(source, training=False, **options):
    """A dataset of small images, with keys, that may have any number of faults."""
    tokenizer = options.pop("tokenizer", lengths)
    arguments = dict(image_size=16, batch_size=8, seed=1)
    arguments.update(include_keys=True, max_skipped=1.0, training=training)
    return image_text_dataset(source, tokenizer, **arguments | options)


def assert_same(batches, expected):
    assert len(batches) == len(expected) > 0
    for one, other in zip(batches, expected):
        assert sorted(one) == sorted(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def saved(tokenizer, folder):
    """The arguments of a `CLIPTokenizer`."""
    tokenizer.save(folder / "saved.json")
    return json.loads((folder / "saved.json").read_text())


def keras_hub_tokenizer(tokenizer, folder):
    """A `CLIPTokenizer` as KerasHub's, which names special tokens differently."""
    keras_hub = pytest.importorskip("keras_hub")
    config = saved(tokenizer, folder)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(t, t): i for i, t in enumerate(config["vocabulary"])}
    merges = [" ".join(merge) for merge in config["merges"]]
    return keras_hub.models.CLIPTokenizer(vocabulary, merges)


class Counted(list):
    """Samples that record which of them are read."""

    def __init__(self, samples):
        super().__init__(samples)
        self.read = []

    def __getitem__(self, number):
        self.read.append(number)
        return super().__getitem__(number)


def read_samples(source, with_images=False, **options):
    """The samples of a source, and the keys and reasons of those that are broken."""
    fields = Fields(**options)
    source = open_source(source, fields.image_keys)
    samples = [*map(fields.sample, read_items(source, [*range(len(source))]))]
    samples = read_named_files(samples) if with_images else samples
    intact = [each for each in samples if not isinstance(each, Fault)]
    return intact, [(x.key, x.reason) for x in samples if isinstance(x, Fault)]


# What `mixed_captions` are made of, besides letters, with spaces between.
PIECES = (
    "<start_of_text> <END_OF_TEXT> <\u017ftart_of_text> </w> !<end_of_text> "
    "'s 'Re '\u017f \u2019s ''s 'sx '\u0345 'd've ` I\u0307 \u0345 "
    "&amp; &AMP &#39; &#xD800; &#0; &bogus; &amp;lt; &ThickSpace; "
    "\u0130 \u1e9e ΑΣ \u0149 \u01f0 \ufb03 \u212a ½ ² ٣ Ⅷ ① 12 3.14 ... #@! "
    "\u200d \ufe0f \u202e \x1c \x85 \u180e \u3000 \ufeff \x1b[31m "
    "\ud83d \udc00 👩\u200d🚀 🇩🇪 CafÃ© â€œquotesâ€\x9d Ã¤ schÃ¶n"
)
# Text of Unicode 14, which every supported Python knows.
LETTERS = [
    chr(code)
    for code in (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE0200))
    if unicodedata.category(chr(code)) != "Cn"
]


def mixed_captions(count, seed):
    """Words of real captions, odd pieces, and letters of all scripts."""
    draw = random.Random(seed)
    words = " ".join(read_captions(example_images() / "test-*.tar")).split()
    # Most code points are Chinese; most scripts are below them.
    pools = words, words, PIECES.split(" "), LETTERS, *[LETTERS[:12_000]] * 4
    captions = []
    for size in draw.choices([1, 3, 8, 60], k=count):
        parts = [draw.choice(draw.choice(pools)) for _ in range(2 * size)]
        captions.append("".join(x + draw.choice(["", " "]) for x in parts))
    return captions
