"""Which weight of open_clip's CLIP is which of keras_hub's, for both directions."""

import dataclasses
import re

import numpy as np
from keras import ops

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

# The same for a block; what stands in braces is stacked in open_clip.
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
        """The entry of a backbone, a float32 array of its own."""
        convert, _ = LAYOUTS[self.layout]
        parts = [convert(ops.convert_to_numpy(v)) for v in self._variables(backbone)]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # Always a copy: what torch hands out is the variable itself.
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


def entries(image_layers, text_layers):
    """All entries of a CLIP, whose towers have so many blocks, as a list."""
    found = [Entry(name, tuple(shape.split()), *rest) for name, shape, *rest in CLIP]
    for (tower, start, path), layers in zip(BLOCKS, (image_layers, text_layers)):
        for i in range(layers):
            for name, shape, layout, variable in BLOCK:
                axes = re.sub("width|hidden", rf"{tower}_\g<0>", shape).split()
                name, variable = f"{start}{i}.{name}", f"{path}{i}.{variable}"
                found.append(Entry(name, tuple(axes), layout, variable))
    return found


def count_blocks(names):
    """How many blocks each tower has, by the names of a state dict."""
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
