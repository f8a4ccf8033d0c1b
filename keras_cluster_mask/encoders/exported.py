"""Models that are exported for inference without Keras."""

import contextlib
import importlib.util
import os
import tempfile
from typing import Any

import keras
import numpy as np

from keras_cluster_mask.distribution.backends import exports_by_torch, onnx_package
from keras_cluster_mask.training.layers import all_layers


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

        To export only one of the encoders, export `image_tower` or `text_tower`.

        Args:
            filepath: Path of the folder or file to write.
            format: As in `keras.Model.export`. `"onnx"` computes in float32, even if
                the model does not, and needs TensorFlow or torch. If you trained on
                JAX, load the `.keras` file there.
            verbose: As in `keras.Model.export`.
            input_signature: List of one `keras.InputSpec`, or of one dictionary of
                them. A dimension of `None` can have any size. Defaults to uint8 images
                and int32 token ids in batches of any size, with texts of any length if
                the text encoder takes them; on JAX, texts have its context length.
                Required on JAX if the encoder defines none.
            **kwargs: As in `keras.Model.export`.

        Raises:
            ValueError: If `format` is `"onnx"` on JAX.
            ImportError: If a package that `"onnx"` needs is not installed.
        """
        signature = input_signature or [self.input_specs]
        on_torch = exports_by_torch()
        if on_torch and format in ("torch", "onnx"):
            # By default, Keras would export for a batch size of 1.
            free = keras.tree.map_structure(_free_dimensions, signature)
            kwargs.setdefault("dynamic_shapes", free)
        if format != "onnx":
            super().export(filepath, format, verbose, signature, **kwargs)
            return
        _prepare_onnx()
        with _in_float32(self), tempfile.TemporaryDirectory() as folder:
            if not on_torch:
                super().export(filepath, format, verbose, signature, **kwargs)
                return
            path = os.path.join(folder, "model.pt2")
            super().export(path, "torch", False, signature, **kwargs)
            _write_onnx(path, filepath, signature)


@contextlib.contextmanager
def _in_float32(model):
    """Lets all layers compute in float32: few runtimes of ONNX know bfloat16."""
    layers = (x for x in all_layers(model) if x.quantization_mode is None)
    mixed = [x for x in layers if x.compute_dtype != x.variable_dtype]
    policies = [x.dtype_policy for x in mixed]
    try:
        for layer in mixed:
            layer.dtype_policy = layer.variable_dtype
        yield
    finally:
        for layer, policy in zip(mixed, policies, strict=True):
            layer.dtype_policy = policy


def _free_dimensions(spec):
    """Returns the dimensions of an input that can have any size, for torch."""
    import torch

    sizes = enumerate(spec.shape)
    return {i: torch.export.Dim.DYNAMIC for i, size in sizes if size is None}


def _write_onnx(path, filepath, signature):
    """Writes a program of torch as ONNX; Keras would write dimensions of 1 only."""
    import torch

    program = torch.export.load(path)
    names = [x.removeprefix("args_0_") for x in program.graph_signature.user_inputs]
    if len(names) == 1:
        names = [signature[0].name or "inputs"]
    torch.onnx.export(program, input_names=names, verbose=False).save(filepath)


def _prepare_onnx():
    """Checks that ONNX can be written, and adds an operation that tf2onnx lacks."""
    package = onnx_package()
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
