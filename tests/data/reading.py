"""How tests read a dataset."""

import itertools

import numpy as np


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


def keys(dataset, count=None):
    return [key.decode() for key in column(take(dataset, count), "keys")]


def lengths(captions):
    """A tokenizer of rows of one number, the length of the caption."""
    return [[len(caption)] for caption in captions]
