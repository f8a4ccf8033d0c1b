"""Contrastive image-text pre-training in Keras 3, with cluster masking."""

import importlib

from keras_cluster_mask import callbacks, distribution, losses, masking, models
from keras_cluster_mask.masking import ClusterMasking, PatchMasking, RandomMasking
from keras_cluster_mask.models import ContrastiveModel, with_masking

__version__ = "0.1.0"

__all__ = [
    "ClusterMasking",
    "ContrastiveModel",
    "PatchMasking",
    "RandomMasking",
    "callbacks",
    "data",
    "distribution",
    "evaluation",
    "interop",
    "losses",
    "masking",
    "models",
    "visualization",
    "with_masking",
]


def __getattr__(name):
    # Imported when first used: `data` brings tensorflow, `visualization` matplotlib.
    if name in ("data", "evaluation", "interop", "visualization"):
        return importlib.import_module(f"keras_cluster_mask.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
