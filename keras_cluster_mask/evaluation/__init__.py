"""Evaluation of a model: retrieval, zero-shot classification, embeddings."""

from keras_cluster_mask.evaluation.classification import (
    classification_accuracy,
    evaluate_zero_shot,
    zero_shot_classifier,
)
from keras_cluster_mask.evaluation.embedding import embed, embed_texts
from keras_cluster_mask.evaluation.retrieval import (
    chance_recall,
    evaluate_retrieval,
    retrieval_recall,
)

__all__ = [
    "chance_recall",
    "classification_accuracy",
    "embed",
    "embed_texts",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "retrieval_recall",
    "zero_shot_classifier",
]


def __dir__():
    return __all__
