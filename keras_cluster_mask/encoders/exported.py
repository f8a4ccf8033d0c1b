"""Models that are exported for inference without Keras."""

import importlib.util
import os
from typing import Any

import keras
import numpy as np

# What Keras writes ONNX with.
ONNX_PACKAGES = {"tensorflow": "tf2onnx", "jax": "jax2onnx", "torch": "onnxscript"}


class Exported:
    """Base class of models that are exported for inference on batches of any size."""

    def export(
        self,
        filepath: str | os.PathLike,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: list | None = None,
        **kwargs: Any,
    ) -> None:
        """Exports the model for inference on batches of any size.

        Export `image_tower` or `text_tower` for one of the encoders alone.

        Args:
            filepath: Path of the folder or file to write.
            format: As in `keras.Model.export`.
            verbose: As in `keras.Model.export`.
            input_signature: List of one `keras.InputSpec`, or of one dictionary of
                them. Defaults to uint8 images and int32 token ids. Required on torch
                and JAX if the text encoder does not define the length of texts, and,
                with a fixed batch size, for `"onnx"` and `"litert"`.
            **kwargs: As in `keras.Model.export`.

        Raises:
            ImportError: If a package that `"onnx"` needs is not installed.
        """
        specs = self.input_specs
        if format == "onnx":
            _prepare_onnx()
        if format == "torch" and "dynamic_shapes" not in kwargs:
            import torch

            # By default, Keras would export for a batch size of 1.
            batch = torch.export.Dim("batch")
            kwargs["dynamic_shapes"] = keras.tree.map_structure(
                lambda x: {0: batch}, specs
            )
        super().export(filepath, format, verbose, input_signature or [specs], **kwargs)


def _prepare_onnx():
    """Checks that Keras can write ONNX, and adds an operation that tf2onnx lacks."""
    package = ONNX_PACKAGES[keras.backend.backend()]
    # Without it, torch would fail after it has printed the whole graph.
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"`format='onnx'` needs {package}: `pip install {package}`. "
            f"Received: an installation without {package}"
        )
    if package == "tf2onnx":
        from tf2onnx.handler import tf_op

        # The first version of ONNX that has `Erf`.
        tf_op("Erfc").register_compat_handler(_write_erfc, 9)


def _write_erfc(graph, node, **kwargs):
    """Writes `Erfc(x)`, which TensorFlow computes GELU by, as `1 - Erf(x)`."""
    from tf2onnx.utils import map_onnx_to_numpy_type

    node.type = "Erf"
    found = node.output[0]
    dtype = map_onnx_to_numpy_type(graph.get_dtype(found))
    one = graph.make_const(f"{node.name}_one", np.ones((), dtype))
    graph.insert_new_node_on_output("Sub", found, inputs=[one.output[0], found])
