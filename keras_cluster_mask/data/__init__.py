"""Image-text pairs for training and evaluation: shards, images and tokens."""

import importlib
import multiprocessing
import sys

# A spawned worker that reads or indexes shards does without Keras and TensorFlow.
if "keras" in sys.modules or multiprocessing.parent_process() is None:
    from keras_cluster_mask.data.batches import ImageTextBatches
    from keras_cluster_mask.data.captions import read_captions
    from keras_cluster_mask.data.check import check
    from keras_cluster_mask.data.convert import convert
    from keras_cluster_mask.data.dataset import image_text_dataset
    from keras_cluster_mask.data.index import open_index
    from keras_cluster_mask.data.skipped import SkippedSamples
    from keras_cluster_mask.data.sources import list_shards, read_samples
    from keras_cluster_mask.data.tokenizers import CLIPTokenizer

__all__ = [
    "CLIPTokenizer",
    "ImageTextBatches",
    "SkippedSamples",
    "check",
    "convert",
    "image_text_dataset",
    "list_shards",
    "open_index",
    "read_captions",
    "read_samples",
]
# The module of each name, for workers.
_MODULES = {
    "CLIPTokenizer": "tokenizers",
    "ImageTextBatches": "batches",
    "SkippedSamples": "skipped",
    "check": "check",
    "convert": "convert",
    "image_text_dataset": "dataset",
    "list_shards": "sources",
    "open_index": "index",
    "read_captions": "captions",
    "read_samples": "sources",
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    globals()[name] = getattr(module, name)
    return globals()[name]
