"""Embeds images and texts in a shared space."""

import functools
import inspect
import types
from collections.abc import Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.backends import is_traced
from keras_cluster_mask.encoders.exported import Exported
from keras_cluster_mask.encoders.masked import MaskedEncoder
from keras_cluster_mask.encoders.pixels import pixel_range
from keras_cluster_mask.encoders.surgery import image_shape_of, number_positions
from keras_cluster_mask.encoders.towers import ImageTower, TextTower
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.head import ContrastiveHead
from keras_cluster_mask.training.input_rules import InputRules
from keras_cluster_mask.training.layers import MadeOfParts, all_layers, as_functional
from keras_cluster_mask.types import Tensor


class DualEncoder(MadeOfParts, Exported, keras.Model):
    """Embeds images and texts. The base class of `ContrastiveModel`.

    Args:
        image_encoder: A Keras model from images to `(batch, d)` features.
        text_encoder: A Keras model from token ids to `(batch, d)` features.
        head: A `ContrastiveHead`, which projects both kinds of features.
        views: Integer. The number of masks of each image in training.
        pixel_mean: Three floats, one per channel, or `None`.
        pixel_std: Three floats, one per channel.
        **kwargs: Arguments of `keras.Model`.

    Attributes:
        towers: Namespace of `image`, an `ImageTower` with the masking, and `text`, a
            `TextTower`. Training, evaluation and export embed with these.
        maskings: List of the `PatchMasking` layers in the image encoder.
        masking: The first of them, or `None`.
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
        pixel_mean: Sequence[float] | None,
        pixel_std: Sequence[float],
        **kwargs: Any,
    ):
        # Each part casts its own inputs. With a mixed policy, the model would cast all
        # weights that it passes to micro-batches. A masking must see pixels in full
        # precision.
        super().__init__(dtype="float32", **kwargs)
        self.autocast = False

        # === Layers ===
        self.image_encoder = as_functional(image_encoder)
        self.text_encoder = as_functional(text_encoder)
        self.head = head
        number_positions(self.image_encoder)
        # In an object that Keras does not look into: each layer belongs to the model.
        self.towers = types.SimpleNamespace(
            image=ImageTower(
                self.image_encoder,
                head.image_projection,
                pixel_mean=pixel_mean,
                pixel_std=pixel_std,
                name="image_tower",
            ),
            text=TextTower(self.text_encoder, head.text_projection, name="text_tower"),
        )

        # === Config ===
        self.pixel_mean = None if pixel_mean is None else [*map(float, pixel_mean)]
        self.pixel_std = None if pixel_std is None else [*map(float, pixel_std)]
        self.text_family = self.towers.text.family
        self.text_input_names = self.towers.text.input_names
        head.build_projections(_width(self.image_encoder), _width(self.text_encoder))

        # === Maskings ===
        self.maskings = [
            x for x in all_layers(self.image_encoder) if isinstance(x, PatchMasking)
        ]
        self.masking = next(iter(self.maskings), None)
        self.views = check_integer("views", views)
        _check_views(views, self.maskings)
        for masking in self.maskings:
            _check_pixels(masking, self.towers.image.prepare)
            masking.join(self.towers.image.prepare)
        # Everything is built, unless an encoder learns its width when it is called.
        self.built = all(x.built for x in all_layers(self) if x is not self)

    # === From inputs to embeddings ===

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
        return self.towers.image.embed(images, training, self.views)

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
            self.input_rules.check_ids(given["token_ids"], "padding_mask" in given)
        return self.towers.text.embed(given, training)

    # === Inputs of the encoders ===

    @property
    def input_rules(self) -> InputRules:
        """The `InputRules` for images and token ids."""
        names, family = self.text_input_names, self.text_family
        return InputRules(
            text_inputs=names,
            image_shape=image_shape_of(self.image_encoder),
            text_shape=image_shape_of(self.text_encoder),
            context_length=self.towers.text.context_length,
            vocabulary_size=getattr(self.text_encoder, "vocabulary_size", None),
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

    # === Other models that share the weights ===

    @functools.cached_property
    def image_tower(self) -> ImageTower:
        """An `ImageTower` that embeds as `encode_image` does.

        It has no masking, which `towers.image` has.
        """
        return self.towers.image.without_masking()

    @functools.cached_property
    def text_tower(self) -> TextTower:
        """A `TextTower`, which embeds token ids as `encode_text` does.

        If the text encoder has several inputs, the tower takes a dictionary of them.
        """
        return self.towers.text.without_masking()

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
