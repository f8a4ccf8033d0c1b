"""Image-text pairs for training and evaluation: shards, images and tokens."""

from keras_cluster_mask.data.captions import read_captions
from keras_cluster_mask.data.check import check
from keras_cluster_mask.data.concept_masking import (
    ConceptTextMasking,
    co_occurrence_graph,
)
from keras_cluster_mask.data.dataset import image_text_dataset
from keras_cluster_mask.data.examples import example_images
from keras_cluster_mask.data.frequency_pruning import FrequencyPruning
from keras_cluster_mask.data.sampling import ClusterSampling
from keras_cluster_mask.data.shards import list_shards
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.stream import ImageTextDataset
from keras_cluster_mask.data.text_masking import (
    BlockTextMasking,
    FrequencyTextMasking,
    RandomTextMasking,
    SyntaxTextMasking,
)
from keras_cluster_mask.data.tokenizers import CLIPTokenizer

__all__ = [
    "BlockTextMasking",
    "CLIPTokenizer",
    "ClusterSampling",
    "ConceptTextMasking",
    "FrequencyPruning",
    "FrequencyTextMasking",
    "ImageTextDataset",
    "RandomTextMasking",
    "SkippedSamples",
    "SyntaxTextMasking",
    "check",
    "co_occurrence_graph",
    "example_images",
    "image_text_dataset",
    "list_shards",
    "read_captions",
]
