"""Towers with a masking inserted, and the model that trains them."""

from keras_cluster_mask.models.clip import CLIPContrastiveModel
from keras_cluster_mask.models.clip_sizes import clip_backbone
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.flops import training_flops
from keras_cluster_mask.models.masked_encoder import MaskedEncoder, with_masking

__all__ = [
    "CLIPContrastiveModel",
    "ContrastiveModel",
    "MaskedEncoder",
    "clip_backbone",
    "training_flops",
    "with_masking",
]
