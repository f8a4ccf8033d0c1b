"""Maps the names of tensors in other libraries to the weights of keras_hub.

A table has one line per tensor: its name, the axes of its shape, the path of the
variable in keras_hub, and its layout in `state_dicts.LAYOUTS` (default: "same"). A
number among the axes is a fixed size. A path with braces names several variables, which
are stacked in one tensor.

Two kinds of lines have a tower, or nothing, in place of the axes:

- If the path ends in a dot, the line sets the prefix of the names and paths after it,
  and the tower that `width` and `hidden` refer to.
- If the last cell is a key of `PARTS`, the line stands for all tensors of that table.
"""

import dataclasses
import re

PARTS = {
    "norm": """
        .weight | width | .gamma
        .bias | width | .beta
    """,
    # torch's attention stacks the query, key and value matrices in one tensor.
    "stacked attention": """
        .in_proj_weight | 3*width width | .{query,key,value}_dense.kernel | to heads
        .in_proj_bias | 3*width | .{query,key,value}_dense.bias | bias of heads
        .out_proj.weight | width width | .output_dense.kernel | from heads
        .out_proj.bias | width | .output_dense.bias
    """,
    "attention": """
        .q_proj.weight | width width | .query_dense.kernel | to heads
        .q_proj.bias | width | .query_dense.bias | bias of heads
        .k_proj.weight | width width | .key_dense.kernel | to heads
        .k_proj.bias | width | .key_dense.bias | bias of heads
        .v_proj.weight | width width | .value_dense.kernel | to heads
        .v_proj.bias | width | .value_dense.bias | bias of heads
        .out_proj.weight | width width | .output_dense.kernel | from heads
        .out_proj.bias | width | .output_dense.bias
    """,
}


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The names that a library uses for the tensors of a two-tower model.

    Attributes:
        model: String, the library's name for the model.
        tensors: String, the table of tensors outside the transformer blocks.
        block: String, the table of tensors in a block.
        towers: Dictionary from `"image"` and `"text"` to the prefix of the names of the
            tower's blocks.
    """

    model: str
    tensors: str
    block: str
    towers: dict[str, str]


def rows(table: str, tower: str = "", name: str = "", path: str = "") -> list[tuple]:
    """Returns the name, axes, layout and path of each tensor in a table.

    Args:
        table: String, in the format described at the top of this file.
        tower: `"image"` or `"text"`, the tower that `width` and `hidden` refer to.
        name: String, the prefix of all names.
        path: String, the prefix of all paths.
    """
    found, start = [], (name, path)
    for line in filter(str.strip, table.splitlines()):
        name, axes, path, *kind = (cell.strip() for cell in line.split("|"))
        if path.endswith("."):
            tower, start = axes, (name, path)
            continue
        name, path, kind = start[0] + name, start[1] + path, kind[0] if kind else "same"
        if kind in PARTS:
            found += rows(PARTS[kind], axes or tower, name, path)
        else:
            axes = re.sub(r"\b(width|hidden)\b", rf"{tower}_\1", axes)
            found.append((name, axes, kind, path))
    return found


def _of_metaclip_2(names, model):
    """Returns the same names with the paths of keras_hub's MetaCLIP 2."""
    tensors = names.tensors.replace("clip_head.", "metaclip_2_head.")
    tensors = tensors.replace("vision_encoder.layer_norm ", "vision_post_layer_norm ")
    return dataclasses.replace(names, model=model, tensors=tensors)


# === open_clip ===

OPEN_CLIP = TensorNames(
    model="CLIP of open_clip",
    tensors="""
logit_scale | | clip_head.logit_scale
logit_bias | | head.logit_bias
visual.proj | image_width projection | vision_projection.kernel
text_projection | text_width projection | text_projection.kernel
visual.ln_pre | image | vision_encoder.pre_layer_norm | norm
visual.ln_post | image | vision_encoder.layer_norm | norm
ln_final | text | text_encoder.layer_norm | norm
visual. | image | vision_encoder.embedding.
class_embedding | width | class_embedding
positional_embedding | positions width | position_embedding.embeddings
conv1.weight | width 3 patch patch | patch_embedding.kernel | convolution
| text | text_encoder.embedding.
token_embedding.weight | vocabulary width | token_embedding.embeddings
positional_embedding | context width | position_embedding.position_embeddings
""",
    block="""
ln_1 | | layer_norm_1 | norm
attn | | attention | stacked attention
ln_2 | | layer_norm_2 | norm
mlp.c_fc.weight | hidden width | dense_1.kernel | matrix
mlp.c_fc.bias | hidden | dense_1.bias
mlp.c_proj.weight | width hidden | dense_2.kernel | matrix
mlp.c_proj.bias | width | dense_2.bias
""",
    towers={
        "image": "visual.transformer.resblocks.",
        "text": "transformer.resblocks.",
    },
)

OPEN_METACLIP_2 = _of_metaclip_2(OPEN_CLIP, "MetaCLIP 2 of open_clip")

# === transformers ===

_EMBEDDINGS = """
vision_model.embeddings. | image | vision_encoder.embedding.
position_embedding.weight | positions width | position_embedding.embeddings
patch_embedding.weight | width 3 patch patch | patch_embedding.kernel | convolution
text_model.embeddings. | text | text_encoder.embedding.
token_embedding.weight | vocabulary width | token_embedding.embeddings
"""
_TOWERS = {
    "image": "vision_model.encoder.layers.",
    "text": "text_model.encoder.layers.",
}

CLIP = TensorNames(
    model="CLIPModel of transformers",
    # "layrnorm" is how transformers spells it.
    tensors=f"""
logit_scale | | clip_head.logit_scale
visual_projection.weight | projection image_width | vision_projection.kernel | matrix
text_projection.weight | projection text_width | text_projection.kernel | matrix
vision_model.pre_layrnorm | image | vision_encoder.pre_layer_norm | norm
vision_model.post_layernorm | image | vision_encoder.layer_norm | norm
text_model.final_layer_norm | text | text_encoder.layer_norm | norm
vision_model.embeddings. | image | vision_encoder.embedding.
class_embedding | width | class_embedding
{_EMBEDDINGS}
position_embedding.weight | context width | position_embedding.position_embeddings
""",
    block="""
layer_norm1 | | layer_norm_1 | norm
self_attn | | attention | attention
layer_norm2 | | layer_norm_2 | norm
mlp.fc1.weight | hidden width | dense_1.kernel | matrix
mlp.fc1.bias | hidden | dense_1.bias
mlp.fc2.weight | width hidden | dense_2.kernel | matrix
mlp.fc2.bias | width | dense_2.bias
""",
    towers=_TOWERS,
)

METACLIP_2 = _of_metaclip_2(CLIP, "MetaClip2Model of transformers")

SIGLIP = TensorNames(
    model="SiglipModel of transformers",
    tensors=f"""
logit_scale | | siglip_head.logit_scale
logit_bias | | siglip_head.logit_bias
vision_model. | image | vision_encoder.
post_layernorm | | post_layer_norm | norm
embeddings.patch_embedding.bias | width | embedding.patch_embedding.bias
head.probe | 1 1 width | head.probe
head.attention | | head.attention | stacked attention
head.layernorm | | head.layer_norm | norm
head.mlp.fc1.weight | hidden width | head.mlp.fc1.kernel | matrix
head.mlp.fc1.bias | hidden | head.mlp.fc1.bias
head.mlp.fc2.weight | width hidden | head.mlp.fc2.kernel | matrix
head.mlp.fc2.bias | width | head.mlp.fc2.bias
text_model. | text | text_encoder.
final_layer_norm | | post_layer_norm | norm
head.weight | projection width | head.kernel | matrix
head.bias | projection | head.bias
{_EMBEDDINGS}
position_embedding.weight | context width | position_embedding.embeddings
""",
    # keras_hub's SigLIP has the same blocks under the names of transformers.
    block=CLIP.block.replace("layer_norm_", "layer_norm")
    .replace("| attention |", "| self_attn |")
    .replace("dense_", "mlp.fc"),
    towers=_TOWERS,
)
