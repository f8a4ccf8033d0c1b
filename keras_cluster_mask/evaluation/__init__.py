"""Judging a model: retrieval."""

from keras_cluster_mask.evaluation.embedding import embed, embed_texts
from keras_cluster_mask.evaluation.retrieval import (
    chance_recall,
    evaluate_retrieval,
    retrieval_recall,
    wilson_interval,
)

__all__ = [
    "chance_recall",
    "embed",
    "embed_texts",
    "evaluate_retrieval",
    "retrieval_recall",
    "wilson_interval",
]
