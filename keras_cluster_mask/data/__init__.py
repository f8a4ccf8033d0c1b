"""Image-text pairs for training and evaluation: shards, images and tokens."""

import importlib

from keras_cluster_mask.data.batches import ImageTextBatches
from keras_cluster_mask.data.captions import read_captions
from keras_cluster_mask.data.dataset import image_text_dataset
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.sources import list_shards, read_samples
from keras_cluster_mask.data.tokenizers import CLIPTokenizer

__all__ = [
    "CLIPTokenizer",
    "ImageTextBatches",
    "SkippedSamples",
    "image_text_dataset",
    "list_shards",
    "preparation",
    "read_captions",
    "read_samples",
]


def __getattr__(name):
    # Imported when first used: it brings matplotlib.
    if name == "preparation":
        return importlib.import_module("keras_cluster_mask.data.preparation")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
