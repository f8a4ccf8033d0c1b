"""Models and weights to and from other libraries."""

import importlib

__all__ = ["clip_benchmark"]


def __getattr__(name):
    # Imported when first used, so that it also runs as a program of its own.
    if name == "clip_benchmark":
        return importlib.import_module("keras_cluster_mask.interop.clip_benchmark")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
