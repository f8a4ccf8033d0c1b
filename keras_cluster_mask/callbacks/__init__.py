"""Callbacks for long training runs."""

from keras_cluster_mask.callbacks.checkpoint import Checkpoint, NonFiniteError
from keras_cluster_mask.callbacks.evaluation import Evaluate, Retrieval, ZeroShot
from keras_cluster_mask.callbacks.throughput import Throughput

__all__ = [
    "Checkpoint",
    "Evaluate",
    "NonFiniteError",
    "Retrieval",
    "Throughput",
    "ZeroShot",
]
