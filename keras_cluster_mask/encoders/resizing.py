"""Copies of encoders for images of another size and texts of another length."""

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_integer, sides_of
from keras_cluster_mask.encoders.families import (
    IMAGE_FAMILIES,
    TEXT_FAMILIES,
    family_of,
)
from keras_cluster_mask.encoders.surgery import (
    data_format_of,
    find_embedding_layer,
    number_positions,
    position_tables,
    read_positions,
)
from keras_cluster_mask.masking.patch_grid import (
    height_and_width,
    is_channels_first,
)
from keras_cluster_mask.training.layers import (
    all_layers,
    omitted_settings,
    restore_settings,
)

# For a model around an encoder.
HINT = "If the model contains a backbone, pass the backbone. "


def with_image_size(
    model: keras.Model, image_size: int | tuple[int, int]
) -> keras.Model:
    """Copies a vision transformer for images of another size.

    All weights are copied except the position embeddings of the patches, which are
    interpolated (bicubic, antialiased, as in open_clip). The position embeddings of
    class tokens are copied. The given model is not changed.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    larger = kcm.models.with_image_size(backbone, 48)
    model = kcm.ContrastiveModel.from_backbone(larger)
    ```

    Args:
        model: A keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or `SigLIPBackbone`, the
            vision encoder of one, a `ViTBackbone` or a `DINOV2Backbone`. DINOv2 has two
            tables of positions: the table used in computation is interpolated, not the
            checkpoint's table.
        image_size: Integer or `(height, width)`, divisible by the patch size. Only
            `ViTBackbone` supports images that are not square.

    Returns:
        A model of the same class with its own weights. Frozen layers stay frozen, and
        LoRA is kept.

    Raises:
        ValueError: For an unsupported model, or a size that is not divisible by the
            patch size.

    Reference:
        - [open_clip](https://github.com/mlfoundations/open_clip), `resize_pos_embed`.
    """
    encoder = getattr(model, "vision_encoder", model)
    family_of("model", encoder, IMAGE_FAMILIES, lambda x: x.resizable, HINT)
    embedding = find_embedding_layer(encoder)
    data_format = data_format_of(encoder)
    shape = tuple(encoder.image_shape)
    old_size = height_and_width(shape, data_format)
    size = sides_of("image_size", image_size)
    patch = patch_size_for(image_size, encoder)

    first = is_channels_first(data_format)
    new_shape = (shape[0], *size) if first else (*size, shape[2])
    # keras_hub's config omits the data format.
    changes = {"data_format": data_format, "image_shape": new_shape}
    if size != old_size and "position_embedding_shape" in encoder.get_config():
        # Otherwise DINOv2 would interpolate its positions on every save and load.
        changes["position_embedding_shape"] = new_shape
    copy = copy_with(model, "vision_encoder", changes)
    copied = find_embedding_layer(getattr(copy, "vision_encoder", copy))

    if size != old_size:
        grids = [tuple(s // p for s, p in zip(x, patch)) for x in (old_size, size)]
        positions = resize_positions(read_positions(embedding), *grids)
        for table in position_tables(copied):
            table.assign(positions)
    number_positions(copied)
    return copy


def patch_size_for(image_size: int | tuple[int, int], encoder: keras.Model) -> tuple:
    """Returns the patch size of an encoder, which must divide an image size."""
    patch = sides_of("patch_size", encoder.patch_size)
    size = sides_of("image_size", image_size)
    if any(s % p for s, p in zip(size, patch)):
        nearest = tuple(max(p, round(s / p) * p) for s, p in zip(size, patch))
        raise ValueError(
            "`image_size` must be divisible by the patch size, for example "
            f"{nearest}. Received: image_size={image_size}, patch_size={patch}"
        )
    return patch


def with_context_length(model: keras.Model, length: int) -> keras.Model:
    """Copies a text encoder for texts of another length.

    All weights are copied except the position embeddings, which are interpolated
    linearly, as in open_clip. Training on short texts first costs less; use the final
    length in the last stage of training. The given model is not changed.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, context_length=8)
    longer = kcm.models.with_context_length(backbone, 16)
    model = kcm.ContrastiveModel.from_backbone(longer)
    ```

    Args:
        model: A keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or `SigLIPBackbone`, or
            the text encoder of one.
        length: Integer. The maximum number of tokens of a text; for SigLIP, the exact
            number.

    Returns:
        A model of the same class with its own weights. Frozen layers stay frozen, and
        LoRA is kept.

    Raises:
        ValueError: For an unsupported model, or a length below 3 (a start token, a word
            and an end token).

    Reference:
        - [An Inverse Scaling Law for CLIP Training](https://arxiv.org/abs/2305.07017)
          for training on short texts.
        - [open_clip](https://github.com/mlfoundations/open_clip),
          `resize_text_pos_embed`.
    """
    encoder = getattr(model, "text_encoder", model)
    family_of("model", encoder, TEXT_FAMILIES, lambda x: x.of_pair, HINT)
    length = check_integer("length", length, 3)
    copy = copy_with(model, "text_encoder", {"max_sequence_length": length})
    for old, new in zip(model.weights, copy.weights):
        # Only the position embeddings and position ids differ in shape. The ids of the
        # copy are already correct.
        has_changed = tuple(old.shape) != tuple(new.shape)
        if has_changed and keras.backend.is_float_dtype(new.dtype):
            table = ops.convert_to_numpy(ops.cast(old, "float32"))
            grids = (len(table), 1), (length, 1)
            new.assign(resize_positions(table, *grids, "bilinear", antialias=False))
    return copy


def copy_with(model, tower: str, changes: dict) -> keras.Model:
    """Copies a model with changes in the configuration of one tower.

    Frozen layers and LoRA are kept. Weights are copied unless their shape has changed.

    Args:
        model: A keras_hub backbone of two towers, or one of the towers.
        tower: `"vision_encoder"` or `"text_encoder"`.
        changes: Dictionary of changes in the tower's configuration.
    """
    config = model.get_config()
    changed = config[tower]["config"] if hasattr(model, tower) else config
    changed.update(changes)
    copy = type(model).from_config(config)
    # The configurations of keras_hub's encoders omit LoRA.
    for old, new in zip(all_layers(model), all_layers(copy)):
        if getattr(old, "lora_enabled", False):
            new.enable_lora(old.lora_rank, old.lora_alpha)
    restore_settings(copy, omitted_settings(model))
    for old, new in zip(model.weights, copy.weights):
        if tuple(old.shape) == tuple(new.shape):
            # Without `ops.copy`, both would share an array on JAX, which a training
            # step donates.
            new.assign(ops.copy(old))
    return copy


def resize_positions(
    table, old_grid, new_grid, interpolation="bicubic", antialias=True
):
    """Interpolates position embeddings from one grid of patches to another.

    Args:
        table: `(..., prefix + rows * columns, dim)` NumPy array, row-major; the prefix
            is copied unchanged.
        old_grid: `(rows, columns)`.
        new_grid: `(rows, columns)`.
        interpolation: String, as in `keras.ops.image.resize`.
        antialias: Boolean. Without it, bicubic resizing differs between backends.

    Returns:
        `(..., prefix + new rows * new columns, dim)` float32 array.
    """
    dim = table.shape[-1]
    prefix = table.shape[-2] - old_grid[0] * old_grid[1]
    first, patches = np.split(table, [prefix], axis=-2)
    resized = ops.image.resize(
        patches.reshape(-1, *old_grid, dim).astype("float32"),
        new_grid,
        interpolation=interpolation,
        antialias=antialias,
        data_format="channels_last",
    )
    resized = ops.convert_to_numpy(resized).reshape(*first.shape[:-2], -1, dim)
    return np.concatenate([first, resized], axis=-2)
