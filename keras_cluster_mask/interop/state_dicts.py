"""State dicts of open_clip's CLIP: which entry is which weight of keras_hub's."""

import collections
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_cluster_mask.interop.weight_files import read_weights

# Name in open_clip, shape there, layout (see `LAYOUTS`), and where keras_hub keeps it.
CLIP = (
    # === Image tower ===
    (
        "visual.class_embedding",
        "image_width",
        "same",
        "vision_encoder.embedding.class_embedding",
    ),
    (
        "visual.positional_embedding",
        "positions image_width",
        "same",
        "vision_encoder.embedding.position_embedding.embeddings",
    ),
    (
        "visual.conv1.weight",
        "image_width 3 patch patch",
        "convolution",
        "vision_encoder.embedding.patch_embedding.kernel",
    ),
    (
        "visual.ln_pre.weight",
        "image_width",
        "same",
        "vision_encoder.pre_layer_norm.gamma",
    ),
    ("visual.ln_pre.bias", "image_width", "same", "vision_encoder.pre_layer_norm.beta"),
    ("visual.ln_post.weight", "image_width", "same", "vision_encoder.layer_norm.gamma"),
    ("visual.ln_post.bias", "image_width", "same", "vision_encoder.layer_norm.beta"),
    ("visual.proj", "image_width projection", "same", "vision_projection.kernel"),
    # === Text tower ===
    (
        "token_embedding.weight",
        "vocabulary text_width",
        "same",
        "text_encoder.embedding.token_embedding.embeddings",
    ),
    (
        "positional_embedding",
        "context text_width",
        "same",
        "text_encoder.embedding.position_embedding.position_embeddings",
    ),
    ("ln_final.weight", "text_width", "same", "text_encoder.layer_norm.gamma"),
    ("ln_final.bias", "text_width", "same", "text_encoder.layer_norm.beta"),
    ("text_projection", "text_width projection", "same", "text_projection.kernel"),
    # === Temperature ===
    ("logit_scale", "", "same", "clip_head.logit_scale"),
)

# The same for a block; open_clip stacks the weights in braces.
BLOCK = (
    ("ln_1.weight", "width", "same", "layer_norm_1.gamma"),
    ("ln_1.bias", "width", "same", "layer_norm_1.beta"),
    (
        "attn.in_proj_weight",
        "3*width width",
        "matrix to heads",
        "attention.{query,key,value}_dense.kernel",
    ),
    (
        "attn.in_proj_bias",
        "3*width",
        "bias of heads",
        "attention.{query,key,value}_dense.bias",
    ),
    (
        "attn.out_proj.weight",
        "width width",
        "matrix from heads",
        "attention.output_dense.kernel",
    ),
    ("attn.out_proj.bias", "width", "same", "attention.output_dense.bias"),
    ("ln_2.weight", "width", "same", "layer_norm_2.gamma"),
    ("ln_2.bias", "width", "same", "layer_norm_2.beta"),
    ("mlp.c_fc.weight", "hidden width", "matrix", "dense_1.kernel"),
    ("mlp.c_fc.bias", "hidden", "same", "dense_1.bias"),
    ("mlp.c_proj.weight", "width hidden", "matrix", "dense_2.kernel"),
    ("mlp.c_proj.bias", "width", "same", "dense_2.bias"),
)

# Tower, the start of its blocks' names in open_clip, and their list in keras_hub.
BLOCKS = (
    ("image", "visual.transformer.resblocks.", "vision_encoder.encoder_layers."),
    ("text", "transformer.resblocks.", "text_encoder.encoder_layers."),
)

# From a variable of keras_hub to open_clip, and back up to a last `reshape`. Matrices
# are (out, in) in torch and (in, out) in Keras, which cuts either side into heads.
LAYOUTS = {
    "same": (lambda x: x, lambda x: x),
    "matrix": (lambda x: x.T, lambda x: x.T),
    "matrix to heads": (lambda x: x.reshape(x.shape[0], -1).T, lambda x: x.T),
    "matrix from heads": (lambda x: x.reshape(-1, x.shape[-1]).T, lambda x: x.T),
    "bias of heads": (lambda x: x.reshape(-1), lambda x: x),
    "convolution": (
        lambda x: x.transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0),
    ),
}

# What older CLIPs have in their state dict beside weights.
HARMLESS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a state dict of open_clip, and what it is in keras_hub.

    Attributes:
        name: String, the entry's name.
        shape: tuple of strings, the names of its axes; a number stands for itself.
        layout: Key of `LAYOUTS`.
        path: String. Where the variable is in a `CLIPBackbone`, or several of them.
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
        """Sets the variables of a backbone to an entry's `array`."""
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


def entries(image_layers: int, text_layers: int) -> list[Entry]:
    """Lists all entries of a CLIP whose towers have these numbers of blocks."""
    found = [Entry(name, tuple(shape.split()), *rest) for name, shape, *rest in CLIP]
    for (tower, start, path), layers in zip(BLOCKS, (image_layers, text_layers)):
        for i in range(layers):
            for name, shape, layout, variable in BLOCK:
                axes = re.sub("width|hidden", rf"{tower}_\g<0>", shape).split()
                name, variable = f"{start}{i}.{name}", f"{path}{i}.{variable}"
                found.append(Entry(name, tuple(axes), layout, variable))
    return found


def read_state_dict(source: Any) -> tuple[dict[str, Any], str]:
    """The weights of a checkpoint under the names of open_clip's `CLIP`.

    Args:
        source: What `load_open_clip` takes.

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
    # What torch's DistributedDataParallel puts before every name.
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): x for name, x in state.items()}
    # open_clip's `CustomTextCLIP` keeps the same text tower one level deeper.
    if "text.token_embedding.weight" in state:
        state = {name.removeprefix("text."): x for name, x in state.items()}
    return {k: x for k, x in state.items() if k not in HARMLESS}, label


def match(state: dict[str, Any], label: str) -> tuple[Iterable, dict[str, int]]:
    """Checks that a state dict is of open_clip's CLIP, and reads its sizes.

    Args:
        state: Dictionary from name to array or tensor.
        label: String, a description of the source for errors.

    Returns:
        A tuple: an iterable of pairs of `Entry` and float32 array, and a dictionary
        of the sizes of their axes, by the names that `Entry.shape` has, and of the
        numbers of blocks.
    """
    blocks = _count_blocks(state)
    if not all(blocks):
        raise ValueError(
            "`source` must hold a CLIP of two transformers as open_clip names them "
            "(`visual.transformer.resblocks.0.ln_1.weight`, "
            "`transformer.resblocks.0.ln_1.weight`). "
            f"Received: {label}, of {len(state)} entries such as {sorted(state)[:5]}"
        )
    expected = entries(*blocks)
    # Some checkpoints hold an array of one element.
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
    # One at a time, as arrays of half precision double in size.
    found = ((entry, _float32(state[entry.name])) for entry in expected)
    return found, {**sizes, "image_layers": blocks[0], "text_layers": blocks[1]}


def _fault(entry, state, sizes):
    """Describes what is wrong with an entry of a state dict; `None` if nothing is."""
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
    """The size of each axis in most tensors, so that a wrong tensor stands out."""
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
        # NumPy can read no tensor of torch on a GPU, or in bfloat16.
        value = value.detach().cpu().float().numpy()
    return np.asarray(value).astype("float32", copy=False)


def _count_blocks(names):
    """Counts the blocks of each tower in the names of a state dict."""
    counts = []
    for _, start, _ in BLOCKS:
        pattern = re.compile(re.escape(start) + r"(\d+)\.")
        counts.append(len({m[1] for m in map(pattern.match, names) if m}))
    return tuple(counts)


def _find(backbone, path):
    found = backbone
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found
