"""Models and weights to and from other libraries."""

import importlib
from typing import TYPE_CHECKING

from keras_cluster_mask.interop.hugging_face import load_hugging_face
from keras_cluster_mask.interop.open_clip_weights import (
    load_open_clip,
    open_clip_state_dict,
    save_open_clip,
)

if TYPE_CHECKING:
    from keras_cluster_mask.interop import clip_benchmark

__all__ = [
    "clip_benchmark",
    "load_hugging_face",
    "load_open_clip",
    "open_clip_state_dict",
    "save_open_clip",
]


if not TYPE_CHECKING:

    def __getattr__(name):
        # Imported when first used, so that it also runs as a program of its own.
        if name == "clip_benchmark":
            return importlib.import_module("keras_cluster_mask.interop.clip_benchmark")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
