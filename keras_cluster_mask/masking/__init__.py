"""Strategies that select which patches of a training image to keep."""

from keras_cluster_mask.masking.block_masking import BlockMasking
from keras_cluster_mask.masking.centered_masking import CenteredMasking
from keras_cluster_mask.masking.cluster_masking import ClusterMasking
from keras_cluster_mask.masking.edge_masking import EdgeMasking
from keras_cluster_mask.masking.grid_masking import GridMasking
from keras_cluster_mask.masking.kmeans_masking import KMeansMasking
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.masking.random_masking import RandomMasking

__all__ = [
    "BlockMasking",
    "CenteredMasking",
    "ClusterMasking",
    "EdgeMasking",
    "GridMasking",
    "KMeansMasking",
    "PatchMasking",
    "RandomMasking",
]


def __dir__():
    return __all__
