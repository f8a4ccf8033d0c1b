"""Callbacks for long training runs."""

from keras_cluster_mask.callbacks.checkpoint import Checkpoint, NonFiniteLossError

__all__ = ["Checkpoint", "NonFiniteLossError"]
