"""Which patches of a training image stay: one strategy a file, one base class."""

from keras_cluster_mask.masking.cluster_masking import ClusterMasking
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.masking.random_masking import RandomMasking
from keras_cluster_mask.masking.statistics import MaskingStatistics, masking_statistics

__all__ = [
    "ClusterMasking",
    "MaskingStatistics",
    "PatchMasking",
    "RandomMasking",
    "masking_statistics",
]
