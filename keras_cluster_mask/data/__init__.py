"""Image-text pairs for training and evaluation: shards, images and tokens."""

from keras_cluster_mask.data.check import check, read_captions
from keras_cluster_mask.data.dataset import image_text_dataset
from keras_cluster_mask.data.frequency_masking import FrequencyTextMasking
from keras_cluster_mask.data.sampling import Sampling
from keras_cluster_mask.data.shards import example_images, list_shards
from keras_cluster_mask.data.splitting import split
from keras_cluster_mask.data.stream import ImageTextDataset, SkippedSamples
from keras_cluster_mask.data.text_masking import (
    BlockTextMasking,
    RandomTextMasking,
    TextMasking,
)
from keras_cluster_mask.data.tokenizers import CLIPTokenizer

__all__ = [
    "BlockTextMasking",
    "CLIPTokenizer",
    "FrequencyTextMasking",
    "ImageTextDataset",
    "RandomTextMasking",
    "Sampling",
    "SkippedSamples",
    "TextMasking",
    "check",
    "example_images",
    "image_text_dataset",
    "list_shards",
    "read_captions",
    "split",
]
