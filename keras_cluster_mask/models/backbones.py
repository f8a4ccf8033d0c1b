"""A `ContrastiveModel` for each kind of keras_hub backbone."""

import math
import os
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.encoders.families import text_family_of
from keras_cluster_mask.encoders.masked import with_masking
from keras_cluster_mask.encoders.pixels import SIGLIP_MEAN, SIGLIP_STD
from keras_cluster_mask.encoders.surgery import CLASSES
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.head import (
    HEAD_OPTIONS,
    INITIAL_LOGIT_BIAS,
    INITIAL_TEMPERATURE,
    ContrastiveHead,
)
from keras_cluster_mask.training.tokens import check_tokenizer


class BackboneModel(ContrastiveModel):
    """A `ContrastiveModel` around a two-tower keras_hub backbone.

    It adds no weights to the backbone, except a masking's few numbers and, for a
    sigmoid loss on a backbone without a bias, the bias.

    Args:
        backbone: A keras_hub backbone.
        masking: A `PatchMasking` layer, or `None`.
        head: A `ContrastiveHead` of the same backbone to share, or `None`.
        **kwargs: Arguments of `ContrastiveModel`, without the encoders and
            `projection_dim`.

    Attributes:
        backbone: The backbone that is trained.
    """

    parts = ("backbone", "masking")
    # Arguments with other defaults than in `ContrastiveModel`.
    defaults: dict[str, Any] = {}

    def __init__(
        self,
        backbone: keras.Model,
        masking: PatchMasking | None = None,
        head: ContrastiveHead | None = None,
        **kwargs: Any,
    ):
        if "dtype" in kwargs:
            raise ValueError(
                "`dtype` must be given to the backbone, which has all the layers that "
                f"compute. Received: dtype={kwargs['dtype']!r}"
            )
        images, texts = self.pooled_encoders(backbone)
        if masking is not None:
            images = with_masking(images, masking)
        kwargs = {**self.defaults, **kwargs}
        if head is None:
            options = {name: kwargs[name] for name in HEAD_OPTIONS if name in kwargs}
            # Raises an error before the backbone is changed.
            ContrastiveHead(**options)
            parts = self.head_parts(backbone, **options)
            head = ContrastiveHead(**options, **parts, name="head")
            kwargs["max_logit_scale"] = head.max_logit_scale
        elif head.logit_scale is not self.head_parts(backbone)["logit_scale"]:
            raise ValueError(
                f"`head` must be that of a model of this backbone. Received: {head}"
            )
        super().__init__(images, texts, head=head, **kwargs)
        self.backbone = backbone

    @classmethod
    def pooled_encoders(cls, backbone: keras.Model) -> tuple[keras.Model, keras.Model]:
        """Returns the encoders of a backbone, from inputs to `(batch, d)` features."""
        return backbone.vision_encoder, backbone.text_encoder

    @classmethod
    def head_parts(cls, backbone: keras.Model, **options: Any) -> dict[str, Any]:
        """Returns the layers and weights of a backbone that a new head shares.

        Args:
            backbone: The backbone. Its temperature and bias are set if the options say
                so.
            **options: Arguments of `ContrastiveHead`.
        """
        raise NotImplementedError

    def save_to_preset(self, preset_dir: str | os.PathLike, tokenizer: Any) -> None:
        """Writes the backbone and its tokenizer as a preset, which keras_hub loads.

        Args:
            preset_dir: str or path of a folder.
            tokenizer: A `CLIPTokenizer`, or a preprocessor of keras_hub.

        Raises:
            ValueError: If the tokenizer does not match the model.
        """
        check_tokenizer(self, tokenizer)
        self.backbone.save_to_preset(os.path.expanduser(preset_dir))
        tokenizer.save_to_preset(os.path.expanduser(preset_dir))

    @property
    def layers(self) -> list[keras.layers.Layer]:
        return [x for x in super().layers if x is not self.backbone]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # The backbone defines these.
        for name in ("dtype", "projection", "projection_dim"):
            del config[name]
        return config


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class CLIPContrastiveModel(BackboneModel):
    """A `ContrastiveModel` around a keras_hub CLIP backbone.

    Args:
        backbone: A `keras_hub.models.CLIPBackbone`.
        **kwargs: See `ContrastiveModel.from_backbone`, which makes this model.
    """

    # The layer of the backbone that holds the temperature.
    scale_owner = "clip_head"

    @classmethod
    def pooled_encoders(cls, backbone: keras.Model) -> tuple[keras.Model, keras.Model]:
        images, texts = backbone.vision_encoder, backbone.text_encoder
        token_ids, tokens = texts.inputs[0], texts.output
        family = text_family_of(backbone)
        # The backbone's `text_pooler` takes the token by index, which torch can export
        # only for a fixed batch size.
        is_pooled = family.is_pooled(token_ids)[:, :, None]
        pooled = ops.sum(tokens * ops.cast(is_pooled, tokens.dtype), axis=1)
        images = _with_output(images, backbone.vision_pooler(images.output))
        texts = _with_output(texts, pooled)
        texts.text_family = family
        return images, texts

    @classmethod
    def head_parts(cls, backbone: keras.Model, **options: Any) -> dict[str, Any]:
        temperature = options.get("initial_temperature")
        if temperature is None and options.get("loss") == "sigmoid":
            temperature = INITIAL_TEMPERATURE["sigmoid"]
        logit_scale = getattr(backbone, cls.scale_owner).logit_scale
        return dict(
            image_projection=backbone.vision_projection,
            text_projection=backbone.text_projection,
            logit_scale=_prepared(logit_scale, temperature),
        )

    def get_config(self) -> dict[str, Any]:
        # keras_hub's config omits it.
        epsilon = self.backbone.text_encoder.layer_norm.epsilon
        return {**super().get_config(), "text_epsilon": epsilon}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        config = dict(config)
        epsilon = config.pop("text_epsilon")
        model = super().from_config(config, custom_objects)
        model.backbone.text_encoder.layer_norm.epsilon = epsilon
        return model


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class MetaCLIP2ContrastiveModel(CLIPContrastiveModel):
    """A `ContrastiveModel` around a keras_hub MetaCLIP 2 backbone.

    A text is pooled at its first end token, whose id the backbone defines. For a text
    without one, `fit`, `evaluate`, `predict` and `kcm.evaluation` raise an error;
    elsewhere its embedding is NaN.

    Args:
        backbone: A `keras_hub.models.MetaCLIP2Backbone`.
        **kwargs: See `ContrastiveModel.from_backbone`, which makes this model.

    Reference:
        - [Meta CLIP 2: A Worldwide Scaling Recipe](https://arxiv.org/abs/2507.22062)
    """

    scale_owner = "metaclip_2_head"

    @classmethod
    def pooled_encoders(cls, backbone: keras.Model) -> tuple[keras.Model, keras.Model]:
        images, texts = super().pooled_encoders(backbone)
        # Without an end token the backbone would pool the first token of a text. If the
        # data cannot be checked beforehand, the NaN shows in the loss.
        is_pooled = texts.text_family.is_pooled(texts.inputs[0])
        has_end = ops.any(is_pooled, axis=1, keepdims=True)
        return (
            _with_output(images, backbone.vision_post_layer_norm(images.output)),
            _with_output(texts, ops.where(has_end, texts.output, math.nan)),
        )


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class SigLIPContrastiveModel(BackboneModel):
    """A `ContrastiveModel` around a keras_hub SigLIP backbone.

    uint8 images are scaled to `[-1, 1]`, as in SigLIP's training.

    Args:
        backbone: A `keras_hub.models.SigLIPBackbone`.
        **kwargs: See `ContrastiveModel.from_backbone`, which makes this model.
    """

    defaults = {
        "loss": "sigmoid",
        # SigLIP is trained without a limit, to scales above 110. This one only stops a
        # scale that diverges.
        "max_logit_scale": 1000.0,
        "pixel_mean": SIGLIP_MEAN,
        "pixel_std": SIGLIP_STD,
    }

    @classmethod
    def head_parts(cls, backbone: keras.Model, **options: Any) -> dict[str, Any]:
        scalars = backbone.siglip_head
        logit_scale, logit_bias = scalars.logit_scale, scalars.logit_bias
        # keras_hub starts at a scale of 1 and a bias of 0. From there, a model would
        # first have to learn that nearly all pairs are negatives.
        if not any(ops.convert_to_numpy(v) for v in (logit_scale, logit_bias)):
            logit_scale.assign(-math.log(INITIAL_TEMPERATURE["sigmoid"]))
            logit_bias.assign(INITIAL_LOGIT_BIAS)
        initial_bias = options.get("initial_logit_bias")
        if initial_bias is not None and options["loss"] == "sigmoid":
            logit_bias.assign(initial_bias)
        return dict(
            logit_scale=_prepared(logit_scale, options.get("initial_temperature")),
            logit_bias=_prepared(logit_bias),
        )


CLASSES.update(
    CLIPBackbone=CLIPContrastiveModel,
    MetaCLIP2Backbone=MetaCLIP2ContrastiveModel,
    SigLIPBackbone=SigLIPContrastiveModel,
)


def _with_output(encoder, output):
    """Returns an encoder with another output, and what a model reads of it."""
    options = {"name": encoder.name, "dtype": encoder.dtype_policy}
    changed = keras.Model(encoder.input, output, **options)
    for name in ("patch_size", "vocabulary_size", "max_sequence_length", "text_family"):
        setattr(changed, name, getattr(encoder, name, None))
    return changed


def _prepared(scalar, temperature=None):
    """Prepares a keras_hub scale or bias, and sets an initial temperature if given."""
    if temperature is not None and temperature > 0:
        scalar.assign(-math.log(temperature))
    # keras_hub initializes it with a Python number, which is weakly typed on JAX. The
    # second step would be compiled again.
    scalar.assign(np.array(ops.convert_to_numpy(scalar)))
    return scalar
