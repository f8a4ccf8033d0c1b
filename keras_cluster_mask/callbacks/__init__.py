"""Callbacks for long training runs."""

from keras_cluster_mask.callbacks.evaluation import Evaluate, Retrieval, ZeroShot
from keras_cluster_mask.training.checkpoints import Checkpoint

__all__ = ["Checkpoint", "Evaluate", "Retrieval", "ZeroShot"]


def __dir__():
    return __all__
