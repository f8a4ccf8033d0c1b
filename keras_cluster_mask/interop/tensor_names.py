"""Names of tensors in other libraries, and which weights of keras_hub they are."""

import dataclasses

# === What a table says ===

# A tensor's name, its shape, its layout (see `state_dicts.LAYOUTS`), and where
# keras_hub keeps it. A number in a shape stands for itself. A path with braces is of
# several weights, which are stacked in one tensor.


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """How a library names the tensors of a model of two transformers.

    Attributes:
        model: String, what the library calls the model.
        tensors: tuple of tuples, those outside the transformer blocks.
        block: tuple of tuples, those of a block, relative to its name.
        towers: tuple of tuples: tower, the start of its blocks' names, and the path of
            their list in keras_hub.
        harmless: frozenset of names that are no weights.
    """

    model: str
    tensors: tuple
    block: tuple
    towers: tuple
    harmless: frozenset


def _norm(name, width, path):
    """The gain and the bias of a layer normalisation."""
    return (
        (f"{name}.weight", width, "same", f"{path}.gamma"),
        (f"{name}.bias", width, "same", f"{path}.beta"),
    )


def _dense(name, inputs, outputs, path):
    """The matrix and the bias of a dense layer."""
    return (
        (f"{name}.weight", f"{outputs} {inputs}", "matrix", f"{path}.kernel"),
        (f"{name}.bias", outputs, "same", f"{path}.bias"),
    )


def _stacked_attention(name, width, path):
    """An attention of torch, whose first three matrices are one tensor."""
    first = f"{path}.{{query,key,value}}_dense"
    last = f"{path}.output_dense"
    return (
        (
            f"{name}.in_proj_weight",
            f"3*{width} {width}",
            "matrix to heads",
            f"{first}.kernel",
        ),
        (f"{name}.in_proj_bias", f"3*{width}", "bias of heads", f"{first}.bias"),
        (
            f"{name}.out_proj.weight",
            f"{width} {width}",
            "matrix from heads",
            f"{last}.kernel",
        ),
        (f"{name}.out_proj.bias", width, "same", f"{last}.bias"),
    )


def _separate_attention(name, path):
    """An attention of transformers, with a matrix for each of query, key and value."""
    found = ()
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        start, layer = f"{name}.{theirs}_proj", f"{path}.{ours}_dense"
        found += (
            (f"{start}.weight", "width width", "matrix to heads", f"{layer}.kernel"),
            (f"{start}.bias", "width", "bias of heads", f"{layer}.bias"),
        )
    start, layer = f"{name}.out_proj", f"{path}.output_dense"
    return (
        *found,
        (f"{start}.weight", "width width", "matrix from heads", f"{layer}.kernel"),
        (f"{start}.bias", "width", "same", f"{layer}.bias"),
    )


def _of_metaclip_2(names, model):
    """The same names where keras_hub has a MetaCLIP 2."""
    moved = {
        "vision_encoder.layer_norm.": "vision_post_layer_norm.",
        "clip_head.": "metaclip_2_head.",
    }
    tensors = []
    for *rest, path in names.tensors:
        for old, new in moved.items():
            path = path.replace(old, new)
        tensors.append((*rest, path))
    return dataclasses.replace(names, model=model, tensors=tuple(tensors))


# === open_clip ===

OPEN_CLIP = TensorNames(
    model="CLIP of open_clip",
    tensors=(
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
        *_norm("visual.ln_pre", "image_width", "vision_encoder.pre_layer_norm"),
        *_norm("visual.ln_post", "image_width", "vision_encoder.layer_norm"),
        ("visual.proj", "image_width projection", "same", "vision_projection.kernel"),
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
        *_norm("ln_final", "text_width", "text_encoder.layer_norm"),
        ("text_projection", "text_width projection", "same", "text_projection.kernel"),
        ("logit_scale", "", "same", "clip_head.logit_scale"),
    ),
    block=(
        *_norm("ln_1", "width", "layer_norm_1"),
        *_stacked_attention("attn", "width", "attention"),
        *_norm("ln_2", "width", "layer_norm_2"),
        *_dense("mlp.c_fc", "width", "hidden", "dense_1"),
        *_dense("mlp.c_proj", "hidden", "width", "dense_2"),
    ),
    towers=(
        ("image", "visual.transformer.resblocks.", "vision_encoder.encoder_layers."),
        ("text", "transformer.resblocks.", "text_encoder.encoder_layers."),
    ),
    # What older CLIPs have in their state dict beside weights.
    harmless=frozenset(
        ("attn_mask", "input_resolution", "context_length", "vocab_size")
    ),
)

OPEN_METACLIP_2 = _of_metaclip_2(OPEN_CLIP, "MetaCLIP 2 of open_clip")

# === transformers ===

_IMAGE = "vision_model.embeddings"
_TEXT = "text_model.embeddings"
_TOWERS = (
    ("image", "vision_model.encoder.layers.", "vision_encoder.encoder_layers."),
    ("text", "text_model.encoder.layers.", "text_encoder.encoder_layers."),
)
_BUFFERS = frozenset((f"{_IMAGE}.position_ids", f"{_TEXT}.position_ids"))
_EMBEDDINGS = (
    (
        f"{_IMAGE}.position_embedding.weight",
        "positions image_width",
        "same",
        "vision_encoder.embedding.position_embedding.embeddings",
    ),
    (
        f"{_IMAGE}.patch_embedding.weight",
        "image_width 3 patch patch",
        "convolution",
        "vision_encoder.embedding.patch_embedding.kernel",
    ),
    (
        f"{_TEXT}.token_embedding.weight",
        "vocabulary text_width",
        "same",
        "text_encoder.embedding.token_embedding.embeddings",
    ),
)

CLIP = TensorNames(
    model="CLIPModel of transformers",
    tensors=(
        *_EMBEDDINGS,
        (
            f"{_IMAGE}.class_embedding",
            "image_width",
            "same",
            "vision_encoder.embedding.class_embedding",
        ),
        # "layrnorm" is how transformers spells it.
        *_norm(
            "vision_model.pre_layrnorm", "image_width", "vision_encoder.pre_layer_norm"
        ),
        *_norm(
            "vision_model.post_layernorm", "image_width", "vision_encoder.layer_norm"
        ),
        (
            "visual_projection.weight",
            "projection image_width",
            "matrix",
            "vision_projection.kernel",
        ),
        (
            f"{_TEXT}.position_embedding.weight",
            "context text_width",
            "same",
            "text_encoder.embedding.position_embedding.position_embeddings",
        ),
        *_norm("text_model.final_layer_norm", "text_width", "text_encoder.layer_norm"),
        (
            "text_projection.weight",
            "projection text_width",
            "matrix",
            "text_projection.kernel",
        ),
        ("logit_scale", "", "same", "clip_head.logit_scale"),
    ),
    block=(
        *_norm("layer_norm1", "width", "layer_norm_1"),
        *_separate_attention("self_attn", "attention"),
        *_norm("layer_norm2", "width", "layer_norm_2"),
        *_dense("mlp.fc1", "width", "hidden", "dense_1"),
        *_dense("mlp.fc2", "hidden", "width", "dense_2"),
    ),
    towers=_TOWERS,
    harmless=_BUFFERS,
)

METACLIP_2 = _of_metaclip_2(CLIP, "MetaClip2Model of transformers")

SIGLIP = TensorNames(
    model="SiglipModel of transformers",
    tensors=(
        *_EMBEDDINGS,
        (
            f"{_IMAGE}.patch_embedding.bias",
            "image_width",
            "same",
            "vision_encoder.embedding.patch_embedding.bias",
        ),
        *_norm(
            "vision_model.post_layernorm",
            "image_width",
            "vision_encoder.post_layer_norm",
        ),
        (
            "vision_model.head.probe",
            "1 1 image_width",
            "same",
            "vision_encoder.head.probe",
        ),
        *_stacked_attention(
            "vision_model.head.attention",
            "image_width",
            "vision_encoder.head.attention",
        ),
        *_norm(
            "vision_model.head.layernorm",
            "image_width",
            "vision_encoder.head.layer_norm",
        ),
        *_dense(
            "vision_model.head.mlp.fc1",
            "image_width",
            "image_hidden",
            "vision_encoder.head.mlp.fc1",
        ),
        *_dense(
            "vision_model.head.mlp.fc2",
            "image_hidden",
            "image_width",
            "vision_encoder.head.mlp.fc2",
        ),
        (
            f"{_TEXT}.position_embedding.weight",
            "context text_width",
            "same",
            "text_encoder.embedding.position_embedding.embeddings",
        ),
        *_norm(
            "text_model.final_layer_norm", "text_width", "text_encoder.post_layer_norm"
        ),
        *_dense("text_model.head", "text_width", "projection", "text_encoder.head"),
        ("logit_scale", "", "same", "siglip_head.logit_scale"),
        ("logit_bias", "", "same", "siglip_head.logit_bias"),
    ),
    block=(
        *_norm("layer_norm1", "width", "layer_norm1"),
        *_separate_attention("self_attn", "self_attn"),
        *_norm("layer_norm2", "width", "layer_norm2"),
        *_dense("mlp.fc1", "width", "hidden", "mlp.fc1"),
        *_dense("mlp.fc2", "hidden", "width", "mlp.fc2"),
    ),
    towers=_TOWERS,
    harmless=_BUFFERS,
)
