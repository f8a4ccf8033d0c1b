"""Judging a model: retrieval."""

from keras_cluster_mask.evaluation.retrieval import (
    chance_recall,
    retrieval_recall,
    wilson_interval,
)

__all__ = ["chance_recall", "retrieval_recall", "wilson_interval"]
