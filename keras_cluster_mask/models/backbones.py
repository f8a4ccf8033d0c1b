"""How a `ContrastiveModel` is made from backbones of keras_hub, and saved as one."""

import math
import os
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.distribution.backends import import_keras_hub
from keras_cluster_mask.encoders.families import (
    PAIR_FAMILIES,
    family_of,
    text_family_of,
)
from keras_cluster_mask.encoders.masked import with_masking
from keras_cluster_mask.encoders.pooled import pretrained_towers
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.head import (
    INITIAL_LOGIT_BIAS,
    INITIAL_TEMPERATURE,
    ContrastiveHead,
    as_head,
)
from keras_cluster_mask.training.tokenizers import (
    check_tokenizer,
    load_from_preset,
    save_in_preset,
)


class OfBackbones:
    """Makes models from backbones of keras_hub, as a mixin before `keras.Model`."""

    @classmethod
    def from_backbone(
        cls,
        backbone: keras.Model,
        masking: PatchMasking | None = None,
        loss: str | None = None,
        head: str | ContrastiveHead = "linear",
        **kwargs: Any,
    ) -> Self:
        """Makes a model from a two-tower keras_hub backbone.

        The model trains the backbone itself, including its projections, temperature and
        bias. After `fit`, `model.save_to_preset(folder)` saves the trained backbone and
        the tokenizer for keras_hub.

        Args:
            backbone: A keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
                `SigLIPBackbone`, fresh or pre-trained. MetaCLIP 2's text tower pools
                the end token, so each text must have one. SigLIP's takes only texts of
                `max_sequence_length` tokens and pools the last one: pad to the full
                length with the end-of-text token, as SigLIP's tokenizer does.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            loss: `"softmax"` or `"sigmoid"`. `None` is the loss of `head`, or that of
                the backbone's family.
            head: `"linear"`, the projections, temperature and bias of the backbone. Or
                a `ContrastiveHead` without `projection_dim`, which sets the temperature
                and the bias if they are given. The scale is limited to 100, or 1000 for
                SigLIP, by default. A fresh SigLIP, and a CLIP with the sigmoid loss,
                start at a temperature of 0.1 and a bias of -10.
            **kwargs: Arguments of `ContrastiveModel`, without the encoders,
                `projection_dim` and `dtype`. `pixel_mean`, `pixel_std` and `resize`
                default to those of the backbone's family.

        Returns:
            A model of this class, with the attribute `backbone`.

        Raises:
            ValueError: If the backbone is not supported.
        """
        family = family_of("backbone", backbone, PAIR_FAMILIES)
        own = {"image_encoder", "text_encoder", "projection_dim", "dtype"}
        if given := sorted(own & kwargs.keys()):
            raise ValueError(
                f"`{'` and `'.join(given)}` must be left out, since the backbone has "
                "all the layers that compute: make the backbone with what you need. "
                f"Received: {', '.join(f'{name}={kwargs[name]!r}' for name in given)}"
            )
        head = ContrastiveHead(name="head") if head == "linear" else head
        if not isinstance(head, ContrastiveHead) or head.projection_dim is not None:
            raise ValueError(
                "`head` must be 'linear', or a `ContrastiveHead` without "
                "`projection_dim`, for a backbone, which has projections of its own. "
                f"Received: head={head}"
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
                "`head` must be new, or that of a model of this backbone. "
                f"Received: {head}"
            )
        options = {
            "pixel_mean": family.pixel_mean,
            "pixel_std": family.pixel_std,
            "resize": family.resize,
            **kwargs,
        }
        return cls(images, texts, head=head, _backbone=backbone, **options)

    @classmethod
    def from_preset(
        cls, preset: str, masking: PatchMasking | None = None, **kwargs: Any
    ) -> Self:
        """Makes a model from a keras_hub preset of a two-tower backbone.

        Args:
            preset: The name of a preset, such as `"clip_vit_base_patch16"`, which
                keras_hub downloads, or a folder that `save_to_preset` wrote.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            **kwargs: As for `from_backbone`; and `dtype`, that of the backbone.
                `tokenizer` defaults to that of the preset, if it has one: a
                `CLIPTokenizer` for CLIP, and the preprocessor for others.
        """
        make = import_keras_hub().models.Backbone.from_preset
        backbone = make(str(preset), dtype=kwargs.pop("dtype", None))
        if "tokenizer" not in kwargs:
            kwargs["tokenizer"] = load_from_preset(str(preset), backbone)
        return cls.from_backbone(backbone, masking, **kwargs)

    @classmethod
    def from_encoders(
        cls,
        image_backbone: keras.Model,
        text_backbone: keras.Model,
        projection_dim: int | None = None,
        masking: PatchMasking | None = None,
        head: str | ContrastiveHead = "linear",
        pooling: tuple[str | None, str | None] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes a model from two encoders that were pre-trained separately.

        Set `trainable = False` on both to train only the projections.

        Args:
            image_backbone: A keras_hub `DINOV2Backbone`, `DINOV3Backbone`,
                `ViTBackbone` or `DeiTBackbone`. Or, without a masking, a
                `ResNetBackbone`, `EfficientNetBackbone` or `MobileNetBackbone`.
            text_backbone: A keras_hub `BertBackbone`, `DistilBertBackbone`,
                `RobertaBackbone`, `XLMRobertaBackbone`, `AlbertBackbone`,
                `ElectraBackbone` or `DebertaV3Backbone`, or a `TextEmbedder` of one.
            projection_dim: Integer. The width of the shared embedding space. Defaults
                to 512, or to that of a `ContrastiveHead`.
            masking: A `PatchMasking` layer, or `None` to train on whole images.
            head: `"linear"`, `"mlp"` or a `ContrastiveHead`, see `ContrastiveModel`.
            pooling: Two strings, for images and for texts: `"class"`, `"mean"`, or
                `"class_and_mean"`. `None` is that of the family: the class token and
                the mean of the patches for DINO, the class token for ViT and DeiT, the
                mean over all positions for convolutional networks, the mean of all
                tokens but padding for texts. A `TextEmbedder` has its own.
            **kwargs: Arguments of `ContrastiveModel`. `pixel_mean` and `pixel_std`
                default to those of the family of `image_backbone`; ImageNet's for
                convolutional networks, as in most of timm's. `tokenizer` defaults to
                the preprocessor of a `TextEmbedder`.

        Reference:
            - [LiT: Zero-Shot Transfer with Locked-image text Tuning](
              https://arxiv.org/abs/2111.07991)
        """
        if projection_dim is None and not isinstance(head, ContrastiveHead):
            projection_dim = 512
        images, texts, statistics = pretrained_towers(
            image_backbone, text_backbone, masking=masking, pooling=pooling
        )
        tokenizer = getattr(text_backbone, "preprocessor", None)
        options = {"tokenizer": tokenizer, **statistics, **kwargs}
        return cls(images, texts, projection_dim=projection_dim, head=head, **options)

    def save_to_preset(
        self, preset_dir: str | os.PathLike, tokenizer: Any = None
    ) -> None:
        """Writes the backbone and its tokenizer as a preset, which keras_hub loads.

        Args:
            preset_dir: str or path of a folder.
            tokenizer: A `CLIPTokenizer`, or a preprocessor of keras_hub. Of others,
                `from_preset` alone loads those of Hugging Face. Defaults to the
                tokenizer of the model.

        Raises:
            ValueError: If the tokenizer does not match the model, if there is none, or
                if the model is not of a backbone.
        """
        if self.backbone is None:
            raise ValueError(
                "`save_to_preset` is for models of `from_backbone`: save another one "
                f"with `model.save`. Received: model={self.name} without a backbone"
            )
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                "`tokenizer` must be given for a model without one. To save the "
                "backbone alone, call `model.backbone.save_to_preset`. "
                "Received: tokenizer=None"
            )
        check_tokenizer(self, tokenizer)
        folder = os.path.expanduser(preset_dir)
        self.backbone.save_to_preset(folder)
        save_in_preset(tokenizer, folder)


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
    """Returns an encoder with another output, and what a model reads of it."""
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
