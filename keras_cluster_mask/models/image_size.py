import keras
import numpy as np
from keras import ops

from keras_cluster_mask.masking.patch_grid import (
    height_and_width,
    is_channels_first,
    sides_of,
)
from keras_cluster_mask.models.encoders import (
    RESIZABLE,
    copy_with,
    data_format_of,
    find_embedding_layer,
    number_positions,
    position_tables,
    read_positions,
)


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
            one of its checkpoint.
        image_size: Integer or `(height, width)`, divisible by the patch size. Only
            `ViTBackbone` supports images that are not square.

    Returns:
        A model of the same class with its own weights. Layers that are frozen in the
        given model are frozen in it too, and it has the same LoRA.

    Raises:
        ValueError: For an unsupported model, or a size that is not divisible by the
            patch size.

    Reference:
        - [open_clip](https://github.com/mlfoundations/open_clip), `resize_pos_embed`.
    """
    encoder = getattr(model, "vision_encoder", model)
    if not any(x.__name__ in RESIZABLE for x in type(encoder).__mro__):
        raise ValueError(
            "`model` must be a keras_hub CLIPBackbone, MetaCLIP2Backbone or "
            "SigLIPBackbone, the vision encoder of one, a ViTBackbone or a "
            "DINOV2Backbone. "
            f"Received: model={model} of type {type(model).__name__}"
        )
    embedding = find_embedding_layer(encoder)
    data_format = data_format_of(encoder)
    shape = tuple(encoder.image_shape)
    old_size = height_and_width(shape, data_format)
    size = sides_of("image_size", image_size)
    patch = sides_of("patch_size", encoder.patch_size)
    if any(s % p for s, p in zip(size, patch)):
        raise ValueError(
            "`image_size` must be divisible by the patch size. "
            f"Received: image_size={image_size}, patch_size={patch}"
        )

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


def resize_positions(table, old_grid, new_grid):
    """Interpolates position embeddings from one grid of patches to another.

    Args:
        table: `(..., prefix + rows * columns, dim)` NumPy array, row-major; the prefix
            is copied unchanged.
        old_grid: `(rows, columns)`.
        new_grid: `(rows, columns)`.

    Returns:
        `(..., prefix + new rows * new columns, dim)` float32 array.
    """
    dim = table.shape[-1]
    prefix = table.shape[-2] - old_grid[0] * old_grid[1]
    first, patches = np.split(table, [prefix], axis=-2)
    # Without antialiasing, bicubic resizing differs between backends.
    resized = ops.image.resize(
        patches.reshape(-1, *old_grid, dim).astype("float32"),
        new_grid,
        interpolation="bicubic",
        antialias=True,
        data_format="channels_last",
    )
    resized = ops.convert_to_numpy(resized).reshape(*first.shape[:-2], -1, dim)
    return np.concatenate([first, resized], axis=-2)
