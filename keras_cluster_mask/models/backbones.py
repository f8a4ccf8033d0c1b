"""Towers and head of a keras_hub backbone of two towers, which share its weights."""

import math
from collections.abc import Sequence

import keras
from keras import ops

from keras_cluster_mask.encoders.families import (
    PAIR_FAMILIES,
    family_of,
    text_family_of,
)
from keras_cluster_mask.encoders.masked import with_masking
from keras_cluster_mask.encoders.towers import ImageTower, TextTower
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.head import ContrastiveHead, as_head


def parts_of_backbone(
    backbone: keras.Model,
    masking: PatchMasking | None,
    loss: str | None,
    head: str | ContrastiveHead,
    **statistics: Sequence[float] | None,
) -> tuple[ImageTower, TextTower, ContrastiveHead, str]:
    """Returns an image tower, a text tower, a head, and how images are resized.

    See `ContrastiveModel.from_backbone`. The backbone's temperature and bias are set if
    the head says so.
    """
    family = family_of("backbone", backbone, PAIR_FAMILIES)
    if head != "linear" and not isinstance(head, ContrastiveHead):
        raise ValueError(
            "`head` must be 'linear' or a `ContrastiveHead` for a backbone, which has "
            f"its own projections. Received: head={head!r}"
        )
    images, texts = _encoders(backbone)
    if masking is not None:
        images = with_masking(images, masking)
    statistics = {
        "pixel_mean": family.pixel_mean,
        "pixel_std": family.pixel_std,
        **statistics,
    }
    of_images, of_texts = (
        getattr(backbone, f"{kind}_projection", None) for kind in ("vision", "text")
    )
    images = ImageTower(images, of_images, name="image_tower", **statistics)
    texts = TextTower(texts, of_texts, name="text_tower")
    head = as_head(head, loss)
    # Last, since it changes the backbone.
    scalars = getattr(backbone, family.head)
    head.settle(family.loss, family.max_logit_scale, scalars)
    return images, texts, head, family.resize


def _encoders(backbone):
    """Returns the encoders of a backbone, from inputs to `(batch, d)` features."""
    images, texts = backbone.vision_encoder, backbone.text_encoder
    if not hasattr(backbone, "vision_pooler"):
        return images, texts
    token_ids, tokens, family = texts.inputs[0], texts.output, text_family_of(backbone)
    # The backbone's `text_pooler` takes the token by index, which torch can export only
    # for a fixed batch size.
    is_pooled = family.is_pooled(token_ids)
    weights = ops.cast(is_pooled[:, :, None], tokens.dtype)
    of_texts = ops.sum(tokens * weights, axis=1)
    of_images = backbone.vision_pooler(images.output)
    if hasattr(backbone, "vision_post_layer_norm"):
        of_images = backbone.vision_post_layer_norm(of_images)
    if family.end_id is not None:
        # Without an end token the backbone would pool the first token of a text. If the
        # data cannot be checked beforehand, the NaN shows in the loss.
        has_end = ops.any(is_pooled, axis=1, keepdims=True)
        of_texts = ops.where(has_end, of_texts, math.nan)
    images, texts = _with_output(images, of_images), _with_output(texts, of_texts)
    texts.text_family = family
    return images, texts


def _with_output(encoder, output):
    """Returns an encoder with another output, and the attributes that a model reads."""
    options = {"name": encoder.name, "dtype": encoder.dtype_policy}
    changed = keras.Model(encoder.input, output, **options)
    for name in ("patch_size", "vocabulary_size", "max_sequence_length"):
        setattr(changed, name, getattr(encoder, name, None))
    return changed
