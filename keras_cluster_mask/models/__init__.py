"""Models that `fit` trains: their encoders, head and training."""

from keras_cluster_mask.encoders.architecture import clip_backbone
from keras_cluster_mask.encoders.masked import MaskedEncoder, with_masking
from keras_cluster_mask.encoders.resizing import with_context_length, with_image_size
from keras_cluster_mask.encoders.towers import ImageTower, TextTower
from keras_cluster_mask.models.averaging import average_weights
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.head import ContrastiveHead

__all__ = [
    "ContrastiveHead",
    "ContrastiveModel",
    "ImageTower",
    "MaskedEncoder",
    "TextTower",
    "average_weights",
    "clip_backbone",
    "with_context_length",
    "with_image_size",
    "with_masking",
]


def __dir__():
    return __all__
