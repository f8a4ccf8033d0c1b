"""Maps the tensors of state dicts to the weights of a keras_hub backbone."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.interop.tensor_names import TensorNames, rows
from keras_cluster_mask.interop.weight_files import read_weights
from keras_cluster_mask.models.architecture import Architecture
from keras_cluster_mask.models.encoders import write_text_epsilon

# The epsilon of all layer normalizations of CLIP. keras_hub uses 1e-6 in the last one
# of the text tower.
CLIP_EPSILON = 1e-5

# Functions from a keras_hub variable to a tensor, and back up to a final `reshape`.
# Matrices are (out, in) in torch and (in, out) in Keras, which splits one of the sides
# into heads.
LAYOUTS = {
    "same": (lambda x: x, lambda x: x),
    "matrix": (lambda x: x.T, lambda x: x.T),
    "to heads": (lambda x: x.reshape(x.shape[0], -1).T, lambda x: x.T),
    "from heads": (lambda x: x.reshape(-1, x.shape[-1]).T, lambda x: x.T),
    "bias of heads": (lambda x: x.reshape(-1), lambda x: x),
    "convolution": (
        lambda x: x.transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0),
    ),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a state dict, and the keras_hub variables that it corresponds to.

    Attributes:
        name: String, the entry's name.
        shape: tuple of strings, the names of its axes; a number stands for itself.
        layout: Key of `LAYOUTS`.
        path: String, the path of the variable in a backbone, or of several variables.
    """

    name: str
    shape: tuple
    layout: str
    path: str

    def read(self, backbone):
        """Reads the entry from a backbone as a new float32 array."""
        convert, _ = LAYOUTS[self.layout]
        parts = [convert(ops.convert_to_numpy(v)) for v in self._variables(backbone)]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # Always a copy: torch returns the memory of the variable itself.
        return np.array(array, "float32", order="C")

    def write(self, backbone, array):
        """Assigns an entry's `array` to the variables of a backbone."""
        _, convert = LAYOUTS[self.layout]
        variables = self._variables(backbone)
        parts = [array] if len(variables) == 1 else np.split(array, len(variables))
        for variable, part in zip(variables, parts):
            variable.assign(convert(part).reshape(variable.shape))

    def sizes(self, architecture):
        """Returns the sizes of the axes, which are named "width", "3*width" or "3"."""
        sizes = []
        for axis in self.shape:
            factor, _, name = axis.rpartition("*")
            size = int(name) if name.isdigit() else getattr(architecture, name)
            sizes.append(int(factor or 1) * size)
        return tuple(sizes)

    def _variables(self, backbone):
        before, *braces = re.split("[{}]", self.path)
        if not braces:
            return [_find(backbone, before)]
        names, after = braces
        return [_find(backbone, before + name + after) for name in names.split(",")]


def entries(names: TensorNames, architecture: Architecture) -> list[Entry]:
    """Lists all entries of a model of this architecture."""
    found = rows(names.tensors)
    for tower, name, path in names.towers:
        for i in range(getattr(architecture, f"{tower}_layers")):
            found += rows(names.block, tower, f"{name}{i}.", f"{path}{i}.")
    return [Entry(name, tuple(axes.split()), *rest) for name, axes, *rest in found]


def read_state_dict(source: Any, names: TensorNames) -> tuple[dict[str, Any], str]:
    """Reads the state dict of a checkpoint, without what wraps it.

    Args:
        source: Path of a file of weights, or a state dict.
        names: The names of the library that wrote it.

    Returns:
        A tuple of a dictionary from name to array or tensor, and of a description of
        the source for errors.
    """
    label = f"source of type {type(source).__name__}"
    if isinstance(source, (str, os.PathLike)):
        label = f"source={os.fspath(source)!r}"
        source = read_weights(source)
    # open_clip's training writes the weights beside the optimizer's state.
    if isinstance(source, Mapping) and isinstance(source.get("state_dict"), Mapping):
        source = source["state_dict"]
    if not isinstance(source, Mapping) or not all(isinstance(x, str) for x in source):
        raise ValueError(
            "`source` must be, or hold, a state dict: a dictionary from names to "
            f"tensors. Received: {label}"
        )
    state = dict(source)
    # torch's DistributedDataParallel adds this prefix to all names.
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): x for name, x in state.items()}
    # open_clip's `CustomTextCLIP` keeps the same text tower one level deeper.
    if "text.token_embedding.weight" in state:
        state = {name.removeprefix("text."): x for name, x in state.items()}
    # Some checkpoints store these as arrays of one element.
    for name in ("logit_scale", "logit_bias"):
        if getattr(state.get(name), "shape", None) == (1,):
            state[name] = state[name][0]
    return {k: x for k, x in state.items() if k not in names.harmless}, label


def read_backbone(
    state: dict[str, Any],
    label: str,
    names: TensorNames,
    architecture: Architecture,
    dtype: Any,
) -> keras.Model:
    """Makes a backbone with the weights of a state dict, or raises an error.

    Args:
        state: Dictionary from name to array or tensor.
        label: String, a description of the source for errors.
        names: The names of the library that wrote it.
        architecture: The `Architecture` that the model's config states. The names in
            `Entry.shape` are its attributes.
        dtype: A dtype policy for the computations.
    """
    blocks_of = (re.compile(rf"{re.escape(x)}(\d+)\.") for _, x, _ in names.towers)
    blocks = [len({m[1] for m in map(x.match, state) if m}) for x in blocks_of]
    if not all(blocks):
        first, *_ = rows(names.block)[0]
        examples = ", ".join(f"`{start}0.{first}`" for _, start, _ in names.towers)
        raise ValueError(
            f"`source` must hold a {names.model}, of two transformers ({examples}). "
            f"Received: {label}, of {len(state)} entries such as {sorted(state)[:5]}"
        )
    expected = entries(names, architecture)
    unexpected = state.keys() - {entry.name for entry in expected}
    faults = [_fault(entry, state, architecture) for entry in expected]
    faults += [f"unexpected: {n} {_text(_shape(state[n]))}" for n in unexpected]
    faults = sorted(filter(None, faults))
    if faults:
        raise ValueError(
            f"`source` is not the {names.model} of its config, with "
            f"{architecture.image_layers} image blocks and {architecture.text_layers} "
            f"text blocks. Received: {label}, with\n  " + "\n  ".join(faults)
        )
    backbone = architecture.make(dtype)
    if architecture.family != "SigLIP":
        write_text_epsilon(backbone, CLIP_EPSILON)
    for entry in expected:
        # Converted one at a time, since half-precision arrays double in size.
        entry.write(backbone, as_float32(state[entry.name]))
    return backbone


def _fault(entry, state, architecture):
    """Describes what is wrong with an entry of a state dict; `None` if nothing is."""
    expected = entry.sizes(architecture)
    if entry.name not in state:
        return f"missing: {entry.name} {_text(expected)}"
    shape = _shape(state[entry.name])
    if shape != expected:
        return f"wrong shape: {entry.name} {_text(shape)}, expected {_text(expected)}"
    if not np.isfinite(as_float32(state[entry.name])).all():
        return f"NaN or infinite: {entry.name}"
    return None


def _shape(value):
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _text(shape):
    if shape is None:
        return "(no tensor)"
    return "(" + ", ".join(map(str, shape)) + ")"


def as_float32(value) -> np.ndarray:
    """Converts an array or a tensor of any precision to a float32 array."""
    if hasattr(value, "detach"):
        # NumPy cannot read torch tensors on a GPU or in bfloat16.
        value = value.detach().cpu().float().numpy()
    return np.asarray(value).astype("float32", copy=False)


def _find(backbone, path):
    found = backbone
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found
