"""Towers with a masking inserted, and the model that trains them."""

from keras_cluster_mask.models.clip import CLIPContrastiveModel
from keras_cluster_mask.models.clip_layout import clip_layout_map
from keras_cluster_mask.models.clip_sizes import clip_backbone
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.flops import training_flops
from keras_cluster_mask.models.image_size import with_image_size
from keras_cluster_mask.models.loading import image_size_of
from keras_cluster_mask.models.masked_encoder import MaskedEncoder, with_masking
from keras_cluster_mask.models.siglip import SigLIPContrastiveModel
from keras_cluster_mask.models.tower import Tower

__all__ = [
    "CLIPContrastiveModel",
    "ContrastiveModel",
    "MaskedEncoder",
    "SigLIPContrastiveModel",
    "Tower",
    "clip_backbone",
    "clip_layout_map",
    "image_size_of",
    "training_flops",
    "with_image_size",
    "with_masking",
]
