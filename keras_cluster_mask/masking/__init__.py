"""Which patches of a training image stay: one strategy a file, one base class."""

from keras_cluster_mask.masking.cluster_masking import ClusterMasking
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.masking.random_masking import RandomMasking

__all__ = ["ClusterMasking", "PatchMasking", "RandomMasking"]
