"""Maps the tensors of state dicts to the weights of a keras_hub backbone."""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import braceexpand
import keras
import numpy as np
from keras import ops

from keras_cluster_mask.encoders.architecture import Architecture
from keras_cluster_mask.interop.configs import CLIP_EPSILON
from keras_cluster_mask.interop.tensor_names import TensorNames, rows
from keras_cluster_mask.interop.weight_files import read_weights
from keras_cluster_mask.models import ContrastiveModel
from keras_cluster_mask.training.model_tokenizer import load_beside_weights

# The bias of a sigmoid loss, which is not in a CLIP backbone but in the model.
BIAS = "head.logit_bias"

# Entries in state dicts of older models that are not weights.
BUFFERS = {
    *("attn_mask", "input_resolution", "context_length", "vocab_size"),
    "vision_model.embeddings.position_ids",
    "text_model.embeddings.position_ids",
}

# Functions from a keras_hub variable to a tensor, and back up to a final `reshape`.
# Matrices are (out, in) in torch and (in, out) in Keras, which splits one of the sides
# into heads.
LAYOUTS = {
    "same": (lambda x: x, lambda x: x),
    "matrix": (lambda x: x.reshape(-1, x.shape[-1]).T, lambda x: x.T),
    "to heads": (lambda x: x.reshape(x.shape[0], -1).T, lambda x: x.T),
    "bias of heads": (lambda x: x.reshape(-1), lambda x: x),
    "convolution": (
        lambda x: x.transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0),
    ),
}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """An entry of a state dict, and the keras_hub variables that it corresponds to.

    Attributes:
        name: String, the entry's name.
        path: String, the path of the variable in a backbone, or of several variables;
            or `BIAS`.
        layout: Key of `LAYOUTS`.
    """

    name: str
    path: str
    layout: str

    def read(self, model):
        """Reads the entry from a backbone or its model as a new float32 array."""
        convert, _ = LAYOUTS[self.layout]
        variables = self._variables(model)
        if not all(keras.backend.is_float_dtype(v.dtype) for v in variables):
            raise ValueError(
                "`model` must have float weights: save it before `quantize`. "
                f"Received: {self.path} of type {variables[0].dtype}"
            )
        parts = [convert(ops.convert_to_numpy(v)) for v in variables]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # Always a copy: torch returns the memory of the variable itself.
        return np.array(array, "float32", order="C")

    def write(self, model, array):
        """Assigns an entry's `array` to the variables of a model."""
        _, convert = LAYOUTS[self.layout]
        variables = self._variables(model)
        parts = [array] if len(variables) == 1 else np.split(array, len(variables))
        for variable, part in zip(variables, parts):
            variable.assign(convert(part).reshape(variable.shape))

    def _variables(self, model):
        return [_find(model, path) for path in braceexpand.braceexpand(self.path)]


def entries(names: TensorNames, backbone: Any, has_bias: bool) -> list[TensorEntry]:
    """Lists all entries of the state dict of a backbone, or of its model."""
    found = []
    for name, path, layout in rows(names.tensors):
        if layout == "blocks":
            for i in range(len(_find(backbone, path))):
                found += rows(names.block, f"{name}.{i}.", f"{path}.{i}.")
        elif path != BIAS or has_bias:
            found.append((name, path, layout))
    return [TensorEntry(*row) for row in found]


def load_model(
    source: Any,
    names: TensorNames,
    architecture: Architecture,
    dtype: Any,
    options: dict[str, Any],
) -> ContrastiveModel:
    """Makes a model with the weights of a checkpoint, or raises an error.

    Args:
        source: Path of a file of weights, or a state dict.
        names: The names of the library that wrote it.
        architecture: The `Architecture` that the model's config states.
        dtype: A dtype policy for the computations.
        options: Arguments of `ContrastiveModel.from_backbone`, which take precedence.
    """
    if "tokenizer" not in options:
        folder = source.parent if isinstance(source, pathlib.Path) else None
        found = load_beside_weights(
            folder, architecture.tokenizer, architecture.context
        )
        options = {**options, "tokenizer": found}
    state, label = _read_state_dict(source)
    if "logit_bias" in state:
        architecture = dataclasses.replace(architecture, loss="sigmoid")
    backbone = architecture.make(dtype)
    expected = entries(names, backbone, architecture.loss == "sigmoid")
    unexpected = state.keys() - {entry.name for entry in expected}
    faults = [_fault(entry, state, backbone) for entry in expected]
    faults += [f"unexpected: {name} {_shape(state[name])}" for name in unexpected]
    faults = sorted(filter(None, faults))
    if faults:
        raise ValueError(
            f"`source` does not match its config, a {names.model} with "
            f"{architecture.image_layers} image blocks and {architecture.text_layers} "
            f"text blocks. Received: {label}, with\n  " + "\n  ".join(faults)
        )
    fields = ["pixel_mean", "pixel_std"]
    if architecture.resize in ("crop", "squash"):
        fields.append("resize")
    elif "resize" not in options:
        warnings.warn(
            f"The model was trained on images resized by {architecture.resize!r}, "
            "which is not supported. Images are cropped here: pass `resize='squash'` "
            "if squashing is closer.",
            stacklevel=3,
        )
    if architecture.family != "SigLIP":
        backbone.text_encoder.layer_norm.epsilon = CLIP_EPSILON
    for entry in expected:
        if entry.path != BIAS:
            # Converted one at a time, since half-precision arrays double in size.
            entry.write(backbone, as_float32(state[entry.name]))
    if getattr(options.get("head"), "loss", None) is None:
        fields.append("loss")
    options = {name: getattr(architecture, name) for name in fields} | options
    model = ContrastiveModel.from_backbone(backbone, **options)
    # `from_backbone` starts a sigmoid loss at another temperature and bias, which only
    # weights of the same loss replace.
    initial = {"logit_scale": "initial_temperature", "logit_bias": "initial_logit_bias"}
    is_same_loss = model.head.loss == architecture.loss
    for entry in expected:
        name = initial.get(entry.name)
        if is_same_loss and name is not None and getattr(model.head, name) is None:
            entry.write(model, as_float32(state[entry.name]))
    return model


def _read_state_dict(source):
    """Returns a checkpoint's state dict without what wraps it, and a description."""
    label = f"source of type {type(source).__name__}"
    if isinstance(source, os.PathLike):
        label = f"source={os.fspath(source)!r}"
        source = read_weights(source)
    if not isinstance(source, Mapping):
        raise ValueError(
            "`source` must be a state dict of tensors, or a file that contains one. "
            f"Received: {label}"
        )
    # Training writes the weights together with the optimizer's state.
    for key in ("state_dict", "model"):
        if isinstance(source.get(key), Mapping):
            source = source[key]
    # `torch.compile` adds this prefix, and DistributedDataParallel the next one.
    state = {name.replace("_orig_mod.", ""): x for name, x in source.items()}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): x for name, x in state.items()}
    # open_clip's `CustomTextCLIP` keeps the same text tower one level deeper.
    if "text.token_embedding.weight" in state:
        state = {name.removeprefix("text."): x for name, x in state.items()}
    return {k: x for k, x in state.items() if k not in BUFFERS}, label


def _fault(entry, state, backbone):
    """Describes what is wrong with an entry of a state dict; `None` if nothing is."""
    # Only the model has a bias, which has no axes.
    expected = () if entry.path == BIAS else entry.read(backbone).shape
    if entry.name not in state:
        return f"missing: {entry.name} {expected}"
    shape = _shape(state[entry.name])
    # Some checkpoints store scalars as arrays of one element.
    if shape != expected and (shape, expected) != ((1,), ()):
        return f"wrong shape: {entry.name} {shape}, expected {expected}"
    if not np.isfinite(as_float32(state[entry.name])).all():
        return f"NaN or infinite: {entry.name}"
    return None


def _shape(value):
    return tuple(value.shape) if hasattr(value, "shape") else "(no tensor)"


def as_float32(value) -> np.ndarray:
    """Converts an array or a tensor of any precision to a float32 array."""
    if hasattr(value, "detach"):
        # NumPy cannot read torch tensors on a GPU or in bfloat16.
        value = value.detach().cpu().float().numpy()
    return np.asarray(value).astype("float32", copy=False)


def _find(model, path):
    # A model's `head` has the bias, which CLIP's backbone lacks.
    found = model if path == BIAS else getattr(model, "backbone", model)
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found
