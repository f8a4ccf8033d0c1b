"""Image encoders with patch masking, and models that train them."""

from keras_cluster_mask.models.architecture import clip_backbone
from keras_cluster_mask.models.backbones import (
    CLIPContrastiveModel,
    MetaCLIP2ContrastiveModel,
    SigLIPContrastiveModel,
)
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.head import ContrastiveHead
from keras_cluster_mask.models.loading import image_size_of
from keras_cluster_mask.models.masked_encoder import MaskedEncoder, with_masking
from keras_cluster_mask.models.momentum_encoder import MomentumEncoder
from keras_cluster_mask.models.resizing import with_context_length, with_image_size
from keras_cluster_mask.models.tower import ImageTower, TextTower, Tower

__all__ = [
    "CLIPContrastiveModel",
    "ContrastiveHead",
    "ContrastiveModel",
    "ImageTower",
    "MaskedEncoder",
    "MetaCLIP2ContrastiveModel",
    "MomentumEncoder",
    "SigLIPContrastiveModel",
    "TextTower",
    "Tower",
    "clip_backbone",
    "image_size_of",
    "with_context_length",
    "with_image_size",
    "with_masking",
]
