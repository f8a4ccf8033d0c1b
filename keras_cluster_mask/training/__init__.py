"""The parts of `fit`: input checks, micro-batches, the optimizer, checkpoints."""

from keras_cluster_mask.training.tower_optimizer import TowerOptimizer, tower_optimizer

__all__ = ["TowerOptimizer", "tower_optimizer"]
