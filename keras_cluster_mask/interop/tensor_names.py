"""Maps the names of tensors in other libraries to the weights of keras_hub.

A table has one line per tensor: its name, the path of the variable in keras_hub, and
its layout in `state_dicts.LAYOUTS` (default: "same"). A path with braces stands for
several variables, which are stacked in one tensor.

If the path ends in a dot, the line sets the prefix of the names and paths after it. If
the last cell is a key of `PARTS`, the line stands for all tensors of that table.
"""

import dataclasses

PARTS = {
    "norm": """
        .weight | .gamma
        .bias | .beta
    """,
    "dense": """
        .weight | .kernel | matrix
        .bias | .bias
    """,
    "heads": """
        .weight | .kernel | to heads
        .bias | .bias | bias of heads
    """,
    # torch's attention stacks the query, key and value matrices in one tensor.
    "stacked attention": """
        .in_proj_weight | .{query,key,value}_dense.kernel | to heads
        .in_proj_bias | .{query,key,value}_dense.bias | bias of heads
        .out_proj | .output_dense | dense
    """,
    "attention": """
        .q_proj | .query_dense | heads
        .k_proj | .key_dense | heads
        .v_proj | .value_dense | heads
        .out_proj | .output_dense | dense
    """,
}


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The names that a library uses for the tensors of a two-tower model.

    Attributes:
        model: String, the library's name for the model.
        tensors: String, the table of tensors outside the transformer blocks.
            A line of the kind "blocks" stands for all blocks of a tower.
        block: String, the table of tensors in a block.
    """

    model: str
    tensors: str
    block: str


def rows(table: str, name: str = "", path: str = "") -> list[tuple[str, str, str]]:
    """Returns the name, path and layout of each tensor in a table.

    Args:
        table: String, in the format described at the top of this file.
        name: String, the prefix of all names.
        path: String, the prefix of all paths.
    """
    found, start = [], (name, path)
    for line in filter(str.strip, table.splitlines()):
        name, path, kind = (*map(str.strip, line.split("|")), "same")[:3]
        if path.endswith("."):
            start = name, path
        elif kind in PARTS:
            found += rows(PARTS[kind], start[0] + name, start[1] + path)
        else:
            found.append((start[0] + name, start[1] + path, kind))
    return found


# === open_clip ===

OPEN_CLIP = TensorNames(
    model="CLIP of open_clip",
    tensors="""
logit_scale | clip_head.logit_scale
logit_bias | head.logit_bias
visual.transformer.resblocks | vision_encoder.encoder_layers | blocks
transformer.resblocks | text_encoder.encoder_layers | blocks
visual.proj | vision_projection.kernel
text_projection | text_projection.kernel
visual.ln_pre | vision_encoder.pre_layer_norm | norm
visual.ln_post | vision_encoder.layer_norm | norm
ln_final | text_encoder.layer_norm | norm
visual. | vision_encoder.embedding.
class_embedding | class_embedding
positional_embedding | position_embedding.embeddings
conv1.weight | patch_embedding.kernel | convolution
| text_encoder.embedding.
token_embedding.weight | token_embedding.embeddings
positional_embedding | position_embedding.position_embeddings
""",
    block="""
ln_1 | layer_norm_1 | norm
attn | attention | stacked attention
ln_2 | layer_norm_2 | norm
mlp.c_fc | dense_1 | dense
mlp.c_proj | dense_2 | dense
""",
)

OPEN_METACLIP_2 = dataclasses.replace(
    OPEN_CLIP,
    model="MetaCLIP 2 of open_clip",
    tensors=OPEN_CLIP.tensors.replace("clip_head.", "metaclip_2_head.").replace(
        "vision_encoder.layer_norm ", "vision_post_layer_norm "
    ),
)

# === transformers ===

_EMBEDDINGS = """
vision_model.embeddings. | vision_encoder.embedding.
position_embedding.weight | position_embedding.embeddings
patch_embedding.weight | patch_embedding.kernel | convolution
text_model.embeddings. | text_encoder.embedding.
token_embedding.weight | token_embedding.embeddings
"""

CLIP = TensorNames(
    model="CLIPModel of transformers",
    # "layrnorm" is how transformers spells it.
    tensors=f"""
logit_scale | clip_head.logit_scale
vision_model.encoder.layers | vision_encoder.encoder_layers | blocks
text_model.encoder.layers | text_encoder.encoder_layers | blocks
visual_projection.weight | vision_projection.kernel | matrix
text_projection.weight | text_projection.kernel | matrix
vision_model.pre_layrnorm | vision_encoder.pre_layer_norm | norm
vision_model.post_layernorm | vision_encoder.layer_norm | norm
text_model.final_layer_norm | text_encoder.layer_norm | norm
vision_model.embeddings.class_embedding | vision_encoder.embedding.class_embedding
{_EMBEDDINGS}
position_embedding.weight | position_embedding.position_embeddings
""",
    block="""
layer_norm1 | layer_norm_1 | norm
self_attn | attention | attention
layer_norm2 | layer_norm_2 | norm
mlp.fc1 | dense_1 | dense
mlp.fc2 | dense_2 | dense
""",
)

SIGLIP = TensorNames(
    model="SiglipModel of transformers",
    tensors=f"""
logit_scale | siglip_head.logit_scale
logit_bias | siglip_head.logit_bias
vision_model. | vision_encoder.
encoder.layers | encoder_layers | blocks
post_layernorm | post_layer_norm | norm
embeddings.patch_embedding.bias | embedding.patch_embedding.bias
head.probe | head.probe
head.attention | head.attention | stacked attention
head.layernorm | head.layer_norm | norm
head.mlp.fc1 | head.mlp.fc1 | dense
head.mlp.fc2 | head.mlp.fc2 | dense
text_model. | text_encoder.
encoder.layers | encoder_layers | blocks
final_layer_norm | post_layer_norm | norm
head | head | dense
{_EMBEDDINGS}
position_embedding.weight | position_embedding.embeddings
""",
    # keras_hub's SigLIP has the same blocks under the names of transformers.
    block=CLIP.block.replace("layer_norm_", "layer_norm")
    .replace("| attention |", "| self_attn |")
    .replace("dense_", "mlp.fc"),
)
