"""The parts of `fit`: input checks, micro-batches, the optimizer, checkpoints."""

from keras_cluster_mask.training.features import TowerFeatures
from keras_cluster_mask.training.tower_optimizer import TowerOptimizer

__all__ = ["TowerFeatures", "TowerOptimizer"]
