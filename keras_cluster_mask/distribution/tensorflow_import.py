"""Imports TensorFlow and keras_hub, which imports it, in a safe order."""

import contextlib
import sys


def import_triton_first():
    """Imports triton, if it is installed, before TensorFlow is imported.

    TensorFlow 2.20 and 2.21 crash a program that imports triton after them, as
    torchvision does (github.com/tensorflow/tensorflow/issues/124205).
    """
    if "tensorflow" not in sys.modules:
        # A broken triton must not affect programs that do not use it.
        with contextlib.suppress(Exception):
            import triton  # noqa: F401


def import_keras_hub():
    """Returns the package keras_hub, which imports TensorFlow on every backend."""
    import_triton_first()
    import keras_hub

    return keras_hub
