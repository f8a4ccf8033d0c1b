"""The parts of `fit`: input checks, micro-batches, the optimizer, checkpoints."""

from keras_cluster_mask.training.features import TowerFeatures

__all__ = ["TowerFeatures"]
