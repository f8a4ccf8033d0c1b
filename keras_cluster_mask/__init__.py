"""Contrastive image-text pre-training in Keras 3, with masked image patches."""

import importlib
import itertools
import multiprocessing
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Type checkers and editors do not call `__getattr__`.
    from keras_cluster_mask import data, evaluation, interop, visualization

# While Python looks for the module of `python -m`, it imports the packages around it.
_IS_COMMAND = sys.argv[:1] == ["-m"] and any(
    option == "-m" and module.startswith(f"{__name__}.")
    for option, module in itertools.pairwise(sys.orig_argv)
)

# A `.keras` file names classes, which are found only if they have been imported. A
# spawned worker that reads data imports this package too, and does without Keras. So do
# this package's own commands, each of which imports what it uses: those on data start
# sooner so, and without messages of TensorFlow.
_NEEDS_KERAS = not (_IS_COMMAND or multiprocessing.parent_process())
if TYPE_CHECKING or "keras" in sys.modules or _NEEDS_KERAS:
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
    from keras_cluster_mask.models import ContrastiveModel, with_masking
    from keras_cluster_mask.recipe import Recipe, small_data_recipe
    from keras_cluster_mask.training import TowerOptimizer, tower_optimizer

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
    "Recipe",
    "TowerOptimizer",
    "callbacks",
    "data",
    "distribution",
    "evaluation",
    "interop",
    "losses",
    "masking",
    "models",
    "small_data_recipe",
    "tower_optimizer",
    "visualization",
    "with_masking",
]


if not TYPE_CHECKING:
    # Hidden from type checkers, which then report names that do not exist.

    def __getattr__(name):
        # Imported when first used: they need packages that `import keras` does not.
        # In a worker this finds all names.
        if name in __all__:
            for module in ("masking", "models", "recipe", "training"):
                module = importlib.import_module(f"{__name__}.{module}")
                if name in module.__all__:
                    return getattr(module, name)
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
