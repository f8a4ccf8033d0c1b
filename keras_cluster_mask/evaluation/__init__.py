"""Judging a model: retrieval, linear probes, SugarCrepe."""

from keras_cluster_mask.evaluation.embedding import embed, embed_texts
from keras_cluster_mask.evaluation.linear_probe import (
    evaluate_linear_probe,
    linear_probe,
)
from keras_cluster_mask.evaluation.retrieval import (
    chance_recall,
    evaluate_retrieval,
    retrieval_recall,
    wilson_interval,
)
from keras_cluster_mask.evaluation.sugarcrepe import (
    caption_selection_accuracy,
    evaluate_sugarcrepe,
)

__all__ = [
    "caption_selection_accuracy",
    "chance_recall",
    "embed",
    "embed_texts",
    "evaluate_linear_probe",
    "evaluate_retrieval",
    "evaluate_sugarcrepe",
    "linear_probe",
    "retrieval_recall",
    "wilson_interval",
]
