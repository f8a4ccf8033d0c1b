"""Conversion of models and weights from and to other libraries."""

from keras_cluster_mask.interop.hugging_face import load_hugging_face
from keras_cluster_mask.interop.open_clip_weights import (
    load_open_clip,
    open_clip_state_dict,
    save_open_clip,
)

__all__ = [
    "load_hugging_face",
    "load_open_clip",
    "open_clip_state_dict",
    "save_open_clip",
]


def __dir__():
    return __all__
