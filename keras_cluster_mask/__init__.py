"""Train CLIP-style models in Keras on half of each image: on a CPU, a training step
takes 50-70 % of the time. From scratch or from pre-trained encoders, on JAX, TensorFlow
and PyTorch.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Type checkers and editors do not call `__getattr__`.
    from keras_cluster_mask import data, evaluation, interop, visualization
    from keras_cluster_mask.feature_extraction import compute_features

# Import the classes that a `.keras` file can refer to, so that Keras finds them. Worker
# processes that read data do not need Keras: they import what they use.
_IS_WORKER = "KERAS_CLUSTER_MASK_WORKER" in os.environ
# Neither does `python -m keras_cluster_mask.search`, for an exported model.
_IS_SEARCH = "keras_cluster_mask.search" in sys.orig_argv
if TYPE_CHECKING or "keras" in sys.modules or not (_IS_WORKER or _IS_SEARCH):
    from keras_cluster_mask import callbacks, distribution, losses, masking, models
    from keras_cluster_mask.masking import (
        BlockMasking,
        CenteredMasking,
        ClusterMasking,
        EdgeMasking,
        GridMasking,
        KMeansMasking,
        PatchMasking,
        RandomMasking,
    )
    from keras_cluster_mask.models import ContrastiveModel, with_masking
    from keras_cluster_mask.optimizers import optimizer_by_block, small_data_optimizer
    from keras_cluster_mask.training import TowerFeatures
    from keras_cluster_mask.tuning import fine_tune

__version__ = "0.1.0"

__all__ = [
    "BlockMasking",
    "CenteredMasking",
    "ClusterMasking",
    "ContrastiveModel",
    "EdgeMasking",
    "GridMasking",
    "KMeansMasking",
    "PatchMasking",
    "RandomMasking",
    "TowerFeatures",
    "callbacks",
    "compute_features",
    "data",
    "distribution",
    "evaluation",
    "fine_tune",
    "interop",
    "losses",
    "masking",
    "models",
    "optimizer_by_block",
    "small_data_optimizer",
    "visualization",
    "with_masking",
]


if not TYPE_CHECKING:
    # Hidden from type checkers, which then report names that do not exist.

    def __getattr__(name):
        # Imported on first use, because these modules need packages that `import keras`
        # does not. A worker process finds all names here.
        if name == "compute_features":
            home = importlib.import_module(f"{__name__}.feature_extraction")
            return home.compute_features
        if name in __all__:
            for module in ("optimizers", "masking", "models", "training", "tuning"):
                module = importlib.import_module(f"{__name__}.{module}")
                if name in module.__all__:
                    return getattr(module, name)
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*__all__, "__version__"]
