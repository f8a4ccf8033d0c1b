"""From a state dict, however it is wrapped, to what a CLIP can be made of."""

import collections
import os
from collections.abc import Mapping

import numpy as np

from keras_cluster_mask.interop.open_clip_names import count_blocks, entries
from keras_cluster_mask.interop.weight_files import read_weights

# What older CLIPs have in their state dict beside weights.
HARMLESS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}


def read_state_dict(source):
    """The weights of a checkpoint under the names of open_clip's `CLIP`.

    Args:
        source: What `load_open_clip` takes.

    Returns:
        A tuple of a dictionary from name to array or tensor, and of how an error says
        where it is from.
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
    # What torch's DistributedDataParallel puts before every name.
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): x for name, x in state.items()}
    # open_clip's `CustomTextCLIP` keeps the same text tower one level deeper.
    if "text.token_embedding.weight" in state:
        state = {name.removeprefix("text."): x for name, x in state.items()}
    return {k: x for k, x in state.items() if k not in HARMLESS}, label


def match(state, label):
    """Finds out what CLIP a state dict is of, and that it is one of open_clip's.

    Args:
        state: Dictionary from name to array or tensor.
        label: String, where it is from.

    Returns:
        A tuple: an iterable of pairs of `Entry` and float32 array, and a dictionary
        of the sizes of their axes, by the names that `Entry.shape` has, and of the
        numbers of blocks.
    """
    blocks = count_blocks(state)
    if not all(blocks):
        raise ValueError(
            "`source` must hold a CLIP of two transformers as open_clip names them "
            "(`visual.transformer.resblocks.0.ln_1.weight`, "
            "`transformer.resblocks.0.ln_1.weight`). "
            f"Received: {label}, of {len(state)} entries such as {sorted(state)[:5]}"
        )
    expected = entries(*blocks)
    # Whether open_clip keeps it as one number or as an array of one.
    if getattr(state.get("logit_scale"), "shape", None) == (1,):
        state = {**state, "logit_scale": state["logit_scale"][0]}
    sizes = _sizes(expected, state)
    unexpected = state.keys() - {entry.name for entry in expected}
    faults = [_fault(entry, state, sizes) for entry in expected]
    faults += [f"unexpected: {n} {_text(_shape(state[n]))}" for n in unexpected]
    faults = sorted(filter(None, faults))
    if faults:
        raise ValueError(
            f"`source` is no CLIP of open_clip with {blocks[0]} image blocks and "
            f"{blocks[1]} text blocks. Received: {label}, with\n  "
            + "\n  ".join(faults)
        )
    # One at a time, as those of half precision become larger.
    found = ((entry, _float32(state[entry.name])) for entry in expected)
    return found, {**sizes, "image_layers": blocks[0], "text_layers": blocks[1]}


def _fault(entry, state, sizes):
    """What is wrong with an entry of a state dict, or `None`."""
    expected = tuple(_size(axis, sizes) for axis in entry.shape)
    if entry.name not in state:
        return f"missing: {entry.name} {_text(expected)}"
    shape = _shape(state[entry.name])
    if not _fits(shape, expected):
        return f"wrong shape: {entry.name} {_text(shape)}, expected {_text(expected)}"
    if not np.isfinite(_float32(state[entry.name])).all():
        return f"NaN or infinite: {entry.name}"
    return None


def _sizes(expected, state):
    """What most tensors say of each axis, so that a wrong one is found out."""
    votes = collections.defaultdict(collections.Counter)
    for entry in expected:
        shape = _shape(state.get(entry.name))
        if shape is not None and len(shape) == len(entry.shape):
            for axis, size in zip(entry.shape, shape):
                votes[axis][size] += 1
    return {axis: counter.most_common(1)[0][0] for axis, counter in votes.items()}


def _size(axis, sizes):
    """The size of an axis such as "width", "3*width" or "3"; `None` if not known."""
    if axis.isdigit():
        return int(axis)
    factor, _, name = axis.rpartition("*")
    size = sizes.get(name)
    return size if size is None or not factor else int(factor) * size


def _shape(value):
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _fits(shape, expected):
    return (
        shape is not None
        and len(shape) == len(expected)
        and all(y is None or x == y for x, y in zip(shape, expected))
    )


def _text(shape):
    if shape is None:
        return "(no tensor)"
    return "(" + ", ".join("?" if x is None else str(x) for x in shape) + ")"


def _float32(value):
    if hasattr(value, "detach"):
        # A tensor of torch's, which NumPy cannot read on a GPU, or in bfloat16.
        value = value.detach().cpu().float().numpy()
    return np.asarray(value).astype("float32", copy=False)
