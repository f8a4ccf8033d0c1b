"""Maps the tensors of state dicts to the weights of a keras_hub backbone."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_cluster_mask.interop.tensor_names import TensorNames, rows
from keras_cluster_mask.interop.weight_files import read_weights

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

    def _variables(self, backbone):
        before, *braces = re.split("[{}]", self.path)
        if not braces:
            return [_find(backbone, before)]
        names, after = braces
        return [_find(backbone, before + name + after) for name in names.split(",")]


def entries(names: TensorNames, image_layers: int, text_layers: int) -> list[Entry]:
    """Lists all entries of a model whose towers have these numbers of blocks."""
    found = rows(names.tensors)
    for (tower, name, path), layers in zip(names.towers, (image_layers, text_layers)):
        for i in range(layers):
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


def match(
    state: dict[str, Any],
    label: str,
    names: TensorNames,
    sizes: Mapping[str, int],
) -> Iterable:
    """Checks that a state dict matches a model, and returns its entries.

    Args:
        state: Dictionary from name to array or tensor.
        label: String, a description of the source for errors.
        names: The names of the library that wrote it.
        sizes: The sizes that the model's config states: the sizes of axes, by the names
            in `Entry.shape`, and the numbers of blocks.

    Returns:
        An iterable of pairs of an `Entry` and a float32 array.
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
    blocks = sizes["image_layers"], sizes["text_layers"]
    expected = entries(names, *blocks)
    unexpected = state.keys() - {entry.name for entry in expected}
    faults = [_fault(entry, state, sizes) for entry in expected]
    faults += [f"unexpected: {n} {_text(_shape(state[n]))}" for n in unexpected]
    faults = sorted(filter(None, faults))
    if faults:
        raise ValueError(
            f"`source` is not the {names.model} of its config, with {blocks[0]} "
            f"image blocks and {blocks[1]} text blocks. Received: {label}, with\n  "
            + "\n  ".join(faults)
        )
    # Convert one at a time, since half-precision arrays double in size.
    return ((entry, as_float32(state[entry.name])) for entry in expected)


def _fault(entry, state, sizes):
    """Describes what is wrong with an entry of a state dict; `None` if nothing is."""
    expected = tuple(_size(axis, sizes) for axis in entry.shape)
    if entry.name not in state:
        return f"missing: {entry.name} {_text(expected)}"
    shape = _shape(state[entry.name])
    if shape != expected:
        return f"wrong shape: {entry.name} {_text(shape)}, expected {_text(expected)}"
    if not np.isfinite(as_float32(state[entry.name])).all():
        return f"NaN or infinite: {entry.name}"
    return None


def _size(axis, sizes):
    """Returns the size of an axis such as "width", "3*width" or "3"."""
    if axis.isdigit():
        return int(axis)
    factor, _, name = axis.rpartition("*")
    return int(factor or 1) * sizes[name]


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
