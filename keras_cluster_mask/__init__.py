"""Contrastive image-text pre-training in Keras 3, with masked image patches."""

import importlib
import multiprocessing
import sys

# A `.keras` file names classes, which are found only if they have been imported. A
# spawned worker that reads data imports this package too, and does without Keras.
if "keras" in sys.modules or multiprocessing.parent_process() is None:
    from keras_cluster_mask import callbacks, distribution, losses, masking, models
    from keras_cluster_mask.masking import (
        AttentiveMasking,
        BlockMasking,
        CenteredMasking,
        ClusterMasking,
        EdgeMasking,
        GridMasking,
        KMeansMasking,
        PatchMasking,
        RandomMasking,
    )
    from keras_cluster_mask.models import (
        ContrastiveModel,
        with_masking,
        with_text_masking,
    )

__version__ = "0.1.0"

__all__ = [
    "AttentiveMasking",
    "BlockMasking",
    "CenteredMasking",
    "ClusterMasking",
    "ContrastiveModel",
    "EdgeMasking",
    "GridMasking",
    "KMeansMasking",
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
    "with_text_masking",
]


def __getattr__(name):
    # Imported when first used: they need packages that `import keras` does not. In a
    # worker this finds all names.
    if name in __all__:
        for module in ("masking", "models"):
            module = importlib.import_module(f"{__name__}.{module}")
            if name in module.__all__:
                return getattr(module, name)
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
