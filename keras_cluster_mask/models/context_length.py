import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.models.encoders import copy_with
from keras_cluster_mask.models.text_families import TEXT_FAMILIES


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
        A model of the same class with its own weights. Layers that are frozen in the
        given model are frozen in it too, and it has the same LoRA.

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
    if type(encoder).__name__ not in {f"{x}TextEncoder" for x in TEXT_FAMILIES}:
        raise ValueError(
            "`model` must be a keras_hub CLIPBackbone, MetaCLIP2Backbone or "
            "SigLIPBackbone, or the text encoder of one. "
            f"Received: model={model} of type {type(model).__name__}"
        )
    length = check_integer("length", length, 3)
    copy = copy_with(model, "text_encoder", {"max_sequence_length": length})
    for old, new in zip(model.weights, copy.weights):
        # Only the position embeddings and position ids differ in shape. The ids of the
        # copy are already correct.
        has_changed = tuple(old.shape) != tuple(new.shape)
        if has_changed and keras.backend.is_float_dtype(new.dtype):
            new.assign(_interpolated(old, length))
    return copy


def _interpolated(table, length):
    """Interpolates `(old length, dim)` positions to `(length, dim)`, at centers."""
    table = ops.convert_to_numpy(ops.cast(table, "float32"))
    old = np.arange(len(table))
    places = (np.arange(length) + 0.5) * len(table) / length - 0.5
    columns = [np.interp(places, old, column) for column in table.T]
    return np.stack(columns, axis=1).astype("float32")
