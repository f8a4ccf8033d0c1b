"""Callbacks for long training runs."""

from keras_cluster_mask.callbacks.checkpoint import Checkpoint, NonFiniteError
from keras_cluster_mask.callbacks.evaluation import Retrieval, ZeroShot
from keras_cluster_mask.callbacks.throughput import Throughput

__all__ = ["Checkpoint", "NonFiniteError", "Retrieval", "Throughput", "ZeroShot"]
