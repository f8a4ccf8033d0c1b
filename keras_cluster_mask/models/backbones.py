"""Encoders and head of a keras_hub backbone of two towers, which share its weights."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.encoders.families import (
    PAIR_FAMILIES,
    family_of,
    text_family_of,
)
from keras_cluster_mask.encoders.masked import with_masking
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.head import (
    INITIAL_LOGIT_BIAS,
    INITIAL_TEMPERATURE,
    ContrastiveHead,
    as_head,
)


def parts_of_backbone(
    backbone: keras.Model,
    masking: PatchMasking | None,
    loss: str | None,
    head: str | ContrastiveHead,
) -> tuple[keras.Model, keras.Model, dict[str, Any]]:
    """Returns an image encoder, a text encoder, and further arguments of a model.

    See `ContrastiveModel.from_backbone`. The backbone's temperature and bias are set if
    the head says so.
    """
    family = family_of("backbone", backbone, PAIR_FAMILIES)
    head = ContrastiveHead(name="head") if head == "linear" else head
    if not isinstance(head, ContrastiveHead) or head.projection_dim is not None:
        raise ValueError(
            "`head` must be 'linear', or a `ContrastiveHead` without `projection_dim`, "
            f"for a backbone, which has its own projections. Received: head={head}"
        )
    images, texts = _encoders(backbone)
    if masking is not None:
        images = with_masking(images, masking)
    # These raise their errors before the backbone is changed.
    as_head(head, loss)
    head.settle(family.loss, family.max_logit_scale)
    scalars = getattr(backbone, family.head)
    if not head.built:
        _share(head, backbone, scalars)
    elif head.logit_scale is not scalars.logit_scale:
        raise ValueError(
            f"`head` must be new, or from a model of this backbone. Received: {head}"
        )
    options = {
        "head": head,
        "pixel_mean": family.pixel_mean,
        "pixel_std": family.pixel_std,
        "resize": family.resize,
    }
    return images, texts, options


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


def _share(head, backbone, scalars):
    """Gives the projections, temperature and bias of a backbone to a new head."""
    scale, bias = scalars.logit_scale, getattr(scalars, "logit_bias", None)
    # keras_hub starts SigLIP at a scale of 1 and a bias of 0. From there, a model would
    # first have to learn that nearly all pairs are negatives.
    is_fresh = bias is not None and not any(map(ops.convert_to_numpy, (scale, bias)))
    temperature = head.initial_temperature
    if temperature is None and (is_fresh or (bias is None and head.loss == "sigmoid")):
        temperature = INITIAL_TEMPERATURE[head.loss]
    if temperature is not None:
        scale.assign(-math.log(temperature))
    given = head.initial_logit_bias
    if bias is not None and (is_fresh or given is not None):
        bias.assign(INITIAL_LOGIT_BIAS if given is None else given)
    for scalar in (scale, bias):
        if scalar is not None:
            # keras_hub initializes it with a Python number, which is weakly typed on
            # JAX. The second step would be compiled again.
            scalar.assign(np.array(ops.convert_to_numpy(scalar)))
    head.logit_scale = scale
    head.logit_bias = None if head.loss == "softmax" else bias
    head.image_projection = getattr(backbone, "vision_projection", None)
    head.text_projection = getattr(backbone, "text_projection", None)
