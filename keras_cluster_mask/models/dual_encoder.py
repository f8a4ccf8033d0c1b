"""Embeds images and texts in a shared space."""

import contextlib
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.backends import is_traced
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.masking.selection import views_of_image
from keras_cluster_mask.models.encoders import (
    BLOCKS,
    context_length_of,
    data_format_of,
    image_shape_of,
    number_positions,
)
from keras_cluster_mask.models.head import ContrastiveHead, l2_normalize
from keras_cluster_mask.models.inputs import (
    call_encoder,
    check_statistics,
    normalize_pixels,
    pixel_range,
    text_family_of,
    text_input_names,
    text_inputs,
)
from keras_cluster_mask.models.masked_encoder import MaskedEncoder
from keras_cluster_mask.models.tower import Exported, Tower
from keras_cluster_mask.training.gradient_checkpointing import (
    checkpointed,
    find_blocks,
)
from keras_cluster_mask.training.input_rules import InputRules
from keras_cluster_mask.training.layers import MadeOfParts, all_layers
from keras_cluster_mask.types import Tensor


class DualEncoder(MadeOfParts, Exported, keras.Model):
    """Embeds images and texts. The base class of `ContrastiveModel`.

    Args:
        image_encoder: A Keras model from images to `(batch, d)` features.
        text_encoder: A Keras model from token ids to `(batch, d)` features.
        head: A `ContrastiveHead`, which projects both kinds of features.
        views: Integer. The number of masks of each image in training.
        gradient_checkpointing: Boolean, or a list of names of layers.
        pixel_mean: Three floats, one per channel, or `None`.
        pixel_std: Three floats, one per channel.
        **kwargs: Arguments of `keras.Model`.

    Attributes:
        maskings: List of the `PatchMasking` layers in the image encoder.
        text_input_names: Tuple of str, the entries of a batch that the text encoder
            takes.
        text_family: The `TextFamily` of the text encoder.
    """

    def __init__(
        self,
        image_encoder: keras.Model,
        text_encoder: keras.Model,
        head: ContrastiveHead,
        views: int,
        gradient_checkpointing: bool | Sequence[str],
        pixel_mean: Sequence[float] | None,
        pixel_std: Sequence[float],
        **kwargs: Any,
    ):
        # Each part casts its own inputs. With a mixed policy, the model would cast all
        # weights that it passes to micro-batches. A masking must see pixels in full
        # precision.
        super().__init__(dtype="float32", **kwargs)
        self.autocast = False
        self.text_input_names = text_input_names(text_encoder)
        self.text_family = text_family_of(text_encoder)
        check_statistics(pixel_mean, pixel_std, image_encoder)
        number_positions(image_encoder)
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.gradient_checkpointing = gradient_checkpointing
        self.pixel_mean = None if pixel_mean is None else [*map(float, pixel_mean)]
        self.pixel_std = None if pixel_std is None else [*map(float, pixel_std)]
        self.head = head
        self.head.build_projections(_width(image_encoder), _width(text_encoder))
        self.normalize_pixels = functools.partial(
            normalize_pixels,
            mean=pixel_mean,
            std=pixel_std,
            data_format=data_format_of(image_encoder),
        )
        self.maskings = [
            x for x in all_layers(image_encoder) if isinstance(x, PatchMasking)
        ]
        self.views = check_integer("views", views)
        _check_views(views, self.maskings)
        for masking in self.maskings:
            _check_pixels(masking, self.normalize_pixels)
            masking.join(self.normalize_pixels)
        # Everything is built, unless an encoder learns its width when it is called.
        self.built = all(x.built for x in all_layers(self) if x is not self)
        if self.built and gradient_checkpointing:
            self._blocks()

    # === From inputs to embeddings ===

    def image_features(self, images: Tensor, training: bool | None = None) -> Tensor:
        """Computes the `(batch, width)` image features that the head projects."""
        features = call_encoder(self.image_encoder, images, training)
        return _check_features(self.image_encoder, features)

    def text_features(self, token_ids: Any, training: bool | None = None) -> Tensor:
        """Computes the `(batch, width)` text features that the head projects."""
        features = call_encoder(self.text_encoder, token_ids, training)
        return _check_features(self.text_encoder, features)

    def encode_image(self, images: Tensor, training: bool | None = None) -> Tensor:
        """Embeds images.

        Args:
            images: `(batch, H, W, C)` tensor, uint8 or normalized floats.
            training: Python boolean. If true, the masking leaves out parts of the
                images.

        Returns:
            `(batch, d)` float32 tensor, L2-normalized. In training with several
            `views`, `(batch, views, d)`.
        """
        if not is_traced(images):
            self.input_rules.check_images(images)
        return self.image_embeddings(images, training)

    def encode_text(
        self, token_ids: Tensor | dict[str, Tensor], training: bool | None = None
    ) -> Tensor:
        """Embeds texts.

        Args:
            token_ids: `(batch, T)` int tensor, or a dictionary of tensors if the text
                encoder has further inputs: `{"token_ids": ..., "padding_mask": ...}`.
            training: Python boolean, passed to the text encoder.

        Returns:
            `(batch, d)` float32 tensor, L2-normalized.

        Raises:
            ValueError: If the ids are not valid for the text encoder, or the dictionary
                does not match its inputs.
        """
        given = token_ids if isinstance(token_ids, dict) else {"token_ids": token_ids}
        if "token_ids" in given and not is_traced(given["token_ids"]):
            has_mask = "padding_mask" in given
            self.input_rules.check_ids(given["token_ids"], has_mask)
        return self.text_embeddings(given, training)

    # The following methods do not check values, because `fit` checks data before
    # training.

    def image_embeddings(self, images: Tensor, training: bool | None = None) -> Tensor:
        """Embeds images as `encode_image` does, without checking values."""
        pixels = self.normalize_pixels(images)
        if self.views == 1 or not training:
            features = self.image_features(pixels, training)
            return l2_normalize(self.head.project_image(features, training))
        with views_of_image(self.views):
            features = self.image_features(pixels, training)
            embeddings = l2_normalize(self.head.project_image(features, training))
        shape = ops.shape(pixels)[0], self.views, embeddings.shape[-1]
        return ops.reshape(embeddings, shape)

    def text_embeddings(
        self, token_ids: Tensor | dict[str, Tensor], training: bool | None = None
    ) -> Tensor:
        """Embeds texts as `encode_text` does, without checking values."""
        if isinstance(token_ids, dict) or len(self.text_input_names) > 1:
            token_ids = text_inputs(self.text_input_names, self.text_family, token_ids)
        features = self.text_features(token_ids, training)
        return l2_normalize(self.head.project_text(features, training))

    def embed(
        self, inputs: Mapping[str, Tensor], training: bool | None = None
    ) -> dict[str, Tensor]:
        """Embeds a batch, or a micro-batch, of images and texts, or of features."""
        if "image_features" in inputs:
            images = self.head.project_image(inputs["image_features"], training)
            texts = self.head.project_text(inputs["text_features"], training)
            return {
                "image_embeddings": l2_normalize(images),
                "text_embeddings": l2_normalize(texts),
            }
        texts = inputs["token_ids"]
        if len(self.text_input_names) > 1:
            texts = {key: inputs[key] for key in self.text_input_names if key in inputs}
        recomputes = training and self.gradient_checkpointing
        with checkpointed(self._blocks()) if recomputes else contextlib.nullcontext():
            return {
                "image_embeddings": self.image_embeddings(inputs["images"], training),
                "text_embeddings": self.text_embeddings(texts, training),
            }

    # === Inputs of the encoders ===

    @property
    def vocabulary_size(self) -> int | None:
        """The vocabulary size of the text encoder, or `None` if unknown."""
        return getattr(self.text_encoder, "vocabulary_size", None)

    @property
    def context_length(self) -> int | None:
        """The maximum number of tokens of a text, or `None` if unknown."""
        return context_length_of(self.text_encoder)

    @property
    def input_rules(self) -> InputRules:
        """The `InputRules` for images and token ids."""
        names, family = self.text_input_names, self.text_family
        has_full_length = family.pooling == "last token"
        length = self.context_length
        return InputRules(
            text_inputs=names,
            image_shape=image_shape_of(self.image_encoder),
            text_shape=(length,) if has_full_length else image_shape_of(self.text_encoder),
            context_length=length,
            vocabulary_size=self.vocabulary_size,
            end_token_id=family.end_id,
            padding_id=family.padding_id if "padding_mask" in names else None,
            pixel_range=pixel_range(self.pixel_mean, self.pixel_std),
        )

    # === What Keras shows ===

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The encoders, the head, and layers of a subclass, with each weight once."""
        return [x for x in super().layers if x not in self.maskings]

    def summary(self, *args: Any, **kwargs: Any) -> None:
        # Keras shows the output shape of a layer that was called on symbols.
        widths = _width(self.image_encoder), _width(self.text_encoder)
        if None not in widths:
            self.head(*(keras.KerasTensor((None, width)) for width in widths))
        if isinstance(self.image_encoder, MaskedEncoder):
            self.image_encoder(self.image_encoder.input)
        super().summary(*args, **kwargs)

    def _blocks(self):
        return find_blocks(self, self.gradient_checkpointing, BLOCKS)

    # === Other models that share the weights ===

    @functools.cached_property
    def image_tower(self) -> Tower:
        """A `Tower` that embeds images, as `encode_image` does."""
        return Tower.of(
            self.image_encoder,
            lambda x: self.head.project_image(self.image_features(x, training=False)),
            pixel_mean=self.pixel_mean,
            pixel_std=self.pixel_std,
            data_format=data_format_of(self.image_encoder),
            name="image_tower",
        )

    @functools.cached_property
    def text_tower(self) -> Tower:
        """A `Tower` that embeds token ids, as `encode_text` does.

        If the text encoder has several inputs, the tower takes a dictionary of them.
        """
        return Tower.of(
            self.text_encoder,
            lambda x: self.head.project_text(self.text_features(x, training=False)),
            name="text_tower",
        )

    @property
    def input_specs(self) -> dict[str, Any]:
        """The `keras.InputSpec` of each input, for `export`."""
        texts = self.text_tower.input_specs
        texts = texts if isinstance(texts, dict) else {"token_ids": texts}
        return {"images": self.image_tower.input_specs, **texts}

    def without_masking(self) -> Self:
        """Makes a model with the same weights that trains on whole images.

        Use it for the last epochs: a model pre-trained on parts of images improves with
        some training on whole images. The models share encoders, projections,
        temperature and bias, so training one trains the other. Only the optimizer is
        new.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        model = kcm.ContrastiveModel.from_backbone(backbone, kcm.RandomMasking(0.5))
        # model.compile(...), model.fit(...), and then:
        whole = model.without_masking()
        whole.compile(optimizer=keras.optimizers.AdamW(1e-5))
        ```

        Returns:
            A model of the same class, to be compiled. A subclass is made from its
            `get_config`, as when it is loaded.

        Raises:
            ValueError: If the image encoder has a masking that `kcm.with_masking` did
                not insert, or if a subclass has arguments that its `get_config` omits,
                or weights of its own, which the new model would not share.

        Reference:
            - [Scaling Language-Image Pre-training via Masking](
              https://arxiv.org/abs/2212.00794) for unmasked tuning.
        """
        parts = {name: _without_masking(getattr(self, name)) for name in self.parts}
        own = {"head": self.head, "views": 1, "frozen": None}
        config = {**self.get_config(), **parts, **own}
        omitted = [
            key
            for key, x in inspect.signature(self.__init__).parameters.items()
            if key not in config and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
        ]
        try:
            if omitted:
                raise TypeError(f"`get_config` omits {omitted}")
            whole = type(self).from_config(config)
            masks = {id(v) for masking in self.maskings for v in masking.weights}
            mine, shared = ({id(v) for v in x.weights} - masks for x in (self, whole))
            if mine != shared:
                raise TypeError(f"{len(mine)} weights, of which not all are shared")
        except TypeError as error:
            raise ValueError(
                f"`{type(self).__name__}` must take its encoders and `head` as "
                "arguments, return all others from `get_config`, and have no other "
                f"weights, to be made without its masking. Received: {error}"
            ) from error
        if whole.maskings:
            raise ValueError(
                "`image_encoder` must have its masking from `kcm.with_masking`, which "
                "can remove it. Received: maskings "
                f"{[masking.name for masking in whole.maskings]} of another kind"
            )
        return whole


def _without_masking(part):
    if isinstance(part, PatchMasking):
        return None
    return part.encoder if isinstance(part, MaskedEncoder) else part


def _check_views(views, maskings):
    if views > 1 and [masking.is_random for masking in maskings] != [True]:
        raise ValueError(
            "`views` must be 1, unless the image encoder has one masking that is "
            "random, such as `RandomMasking`: put it there with `kcm.with_masking`, or "
            "pass `masking` to `from_backbone`. Other maskings follow from the image, "
            f"so all views would be alike. Received: views={views}, maskings="
            f"{[masking.name for masking in maskings]}"
        )


def _width(encoder):
    shape = getattr(getattr(encoder, "output", None), "shape", None)
    return None if shape is None else shape[-1]


def _check_features(encoder, features):
    if len(getattr(features, "shape", ())) != 2:
        raise ValueError(
            "An encoder must return features of shape (batch, d); add a pooling to one "
            f"that returns tokens. Received: {encoder.name} returned "
            f"{getattr(features, 'shape', type(features).__name__)}"
        )
    return features


def _check_pixels(masking, prepare_pixels):
    """Raises an error for a masking of a model that normalizes pixels differently."""
    pixels = ops.convert_to_tensor(np.arange(27, dtype="uint8").reshape(1, 3, 3, 3))
    both = masking.prepare_pixels(pixels), prepare_pixels(pixels)
    is_equal = np.array_equal(*map(ops.convert_to_numpy, both))
    if not (masking.counts_calls or is_equal):
        raise ValueError(
            f"`{masking.name}` is part of another model, which normalizes pixels "
            "differently: make a masking layer for each model. "
            f"Received: masking={masking.name}"
        )
