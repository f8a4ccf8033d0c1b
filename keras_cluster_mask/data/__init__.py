"""Image-text pairs for training and evaluation: shards, images and tokens."""

from keras_cluster_mask.data.check import check, read_captions
from keras_cluster_mask.data.clip_tokenizer import CLIPTokenizer
from keras_cluster_mask.data.dataset import ImageTextDataset, image_text_dataset
from keras_cluster_mask.data.frequency_masking import FrequencyTextMasking
from keras_cluster_mask.data.paths import example_images
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.splitting import split, subset
from keras_cluster_mask.data.text_masking import (
    BlockTextMasking,
    RandomTextMasking,
    TextMasking,
)

__all__ = [
    "BlockTextMasking",
    "CLIPTokenizer",
    "FrequencyTextMasking",
    "ImageTextDataset",
    "RandomTextMasking",
    "SkippedSamples",
    "TextMasking",
    "check",
    "example_images",
    "image_text_dataset",
    "read_captions",
    "split",
    "subset",
]


def __dir__():
    return __all__
