import keras

from keras_cluster_mask.checks import check_choice
from keras_cluster_mask.distribution.backends import import_keras_hub
from keras_cluster_mask.masking.patch_grid import is_channels_first
from keras_cluster_mask.models.encoders import number_positions

# Widths, depths and heads of the two towers. All sizes except "tiny" are those of
# open_clip's model configurations of the same names
# (https://github.com/mlfoundations/open_clip). The paper uses ViT-B/16.
SIZES = {
    "tiny": dict(patch=8, image=(96, 3, 3), text=(96, 1, 3), projection=96),
    "vit_s_16": dict(patch=16, image=(384, 12, 6), text=(384, 12, 6), projection=384),
    "vit_b_32": dict(patch=32, image=(768, 12, 12), text=(512, 12, 8), projection=512),
    "vit_b_16": dict(patch=16, image=(768, 12, 12), text=(512, 12, 8), projection=512),
    "vit_l_16": dict(
        patch=16, image=(1024, 24, 16), text=(768, 12, 12), projection=768
    ),
    "vit_l_14": dict(
        patch=14, image=(1024, 24, 16), text=(768, 12, 12), projection=768
    ),
}


def clip_backbone(
    size: str,
    image_size: int = 224,
    vocabulary_size: int = 49408,
    context_length: int = 77,
    patch_size: int | None = None,
    activation: str = "gelu",
    dtype: str | keras.DTypePolicy | None = None,
) -> keras.Model:
    """Makes a CLIP model of a given size, with random weights.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=4096)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    ```

    Args:
        size: `"tiny"` (for images of 32 to 64 pixels and small data),
            `"vit_s_16"`, `"vit_b_32"`, `"vit_b_16"`, `"vit_l_16"` or `"vit_l_14"`.
        image_size: Integer. The side of the square images in pixels.
        vocabulary_size: Integer. The tokenizer's number of ids; 49,408 for
            CLIP's vocabulary.
        context_length: Integer. The maximum number of tokens of a text.
        patch_size: Integer. Defaults to that of the size: 8 for `"tiny"`, else the
            number in its name.
        activation: `"gelu"`, or `"quick_gelu"` as in OpenAI's weights.
        dtype: A dtype policy for the computations, such as `"mixed_bfloat16"`.

    Returns:
        A `keras_hub.models.CLIPBackbone`.

    Raises:
        ValueError: For an unknown size, or if the patch size does not divide
            the image size.
    """
    shape, patch_size = size_and_patch(size, image_size, patch_size)
    return make_clip(
        {**shape, "patch": patch_size},
        image_size,
        vocabulary_size,
        context_length,
        activation,
        dtype,
    )


def make_clip(
    shape,
    image_size,
    vocabulary_size,
    context_length,
    activation,
    dtype,
    family="CLIP",
):
    """Makes a CLIP, or the `family` "MetaCLIP2" or "SigLIP", shaped as in `SIZES`."""
    # Imported here, because importing keras_hub takes seconds and other functions do
    # not need it.
    keras_hub = import_keras_hub()
    vision, text, backbone = (
        getattr(keras_hub.models, family + part)
        for part in ("VisionEncoder", "TextEncoder", "Backbone")
    )
    projection = {"projection_dim": shape["projection"]}
    # SigLIP projects only texts, in the text tower.
    of_text, of_both = (projection, {}) if family == "SigLIP" else ({}, projection)
    vision_encoder = vision(
        patch_size=shape["patch"],
        image_shape=image_shape(image_size),
        name="vision_encoder",
        **_tower(shape["image"], activation, dtype),
    )
    text_encoder = text(
        vocabulary_size=vocabulary_size,
        embedding_dim=shape["text"][0],
        max_sequence_length=context_length,
        name="text_encoder",
        **of_text,
        **_tower(shape["text"], activation, dtype),
    )
    number_positions(vision_encoder.embedding)
    return backbone(
        vision_encoder=vision_encoder,
        text_encoder=text_encoder,
        dtype=dtype,
        **of_both,
    )


def size_and_patch(size, image_size, patch_size):
    """Returns the entry of `SIZES` and the patch size, or raises if they do not fit."""
    check_choice("size", size, tuple(SIZES))
    patch_size = patch_size or SIZES[size]["patch"]
    if image_size % patch_size:
        raise ValueError(
            "`image_size` must be divisible by the patch size. Received: "
            f"image_size={image_size}, patch_size={patch_size}"
        )
    return SIZES[size], patch_size


def _tower(shape, activation, dtype):
    width, layers, heads, *hidden = shape
    return dict(
        hidden_dim=width,
        num_layers=layers,
        num_heads=heads,
        intermediate_dim=hidden[0] if hidden else 4 * width,
        intermediate_activation=activation,
        dtype=dtype,
    )


def image_shape(side):
    """Returns the shape of square images, in the data format that Keras is set to."""
    if is_channels_first():
        return (3, side, side)
    return (side, side, 3)
