"""Image encoders with patch masking, and models that train them."""

from keras_cluster_mask.encoders.architecture import clip_backbone
from keras_cluster_mask.encoders.masked import MaskedEncoder, with_masking
from keras_cluster_mask.encoders.momentum import MomentumEncoder
from keras_cluster_mask.encoders.resizing import with_context_length, with_image_size
from keras_cluster_mask.encoders.towers import ImageTower, TextTower, Tower
from keras_cluster_mask.models.backbones import (
    CLIPContrastiveModel,
    MetaCLIP2ContrastiveModel,
    SigLIPContrastiveModel,
)
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.head import ContrastiveHead
from keras_cluster_mask.models.loading import image_size_of

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
