"""Two towers and a head: what a model consists of, and how it is saved."""

import inspect
import os
from collections.abc import Sequence
from typing import Any, Self

import keras

from keras_cluster_mask.checks import check_choice, check_integer
from keras_cluster_mask.distribution.replicas import OwnReduction
from keras_cluster_mask.encoders.exported import Exported
from keras_cluster_mask.encoders.families import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.encoders.projections import projection
from keras_cluster_mask.encoders.surgery import inputs_of, number_positions
from keras_cluster_mask.encoders.towers import ImageTower, TextTower, Tower
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.head import ContrastiveHead, as_head
from keras_cluster_mask.training.layers import (
    Untracked,
    all_layers,
    omitted_settings,
)
from keras_cluster_mask.training.model_tokenizer import (
    check_kind,
    check_matching_tokenizer,
    load_tokenizer,
    save_in_preset,
    save_tokenizer,
)
from keras_cluster_mask.types import Tokenizer

# Parts and options that others depend on once the model is made.
FIXED = (
    "backbone",
    "head",
    "image_encoder",
    "image_tower",
    "masking",
    "maskings",
    "pixel_mean",
    "pixel_std",
    "text_encoder",
    "text_tower",
)
CHOICES = {"duplicates": ("positive", "negative"), "resize": ("crop", "squash")}


class TwoTowers(OwnReduction, Exported, keras.Model):
    """Holds two towers and a head, and saves and loads them.

    The base class of `ContrastiveModel`, which describes the arguments.
    """

    image_tower: ImageTower
    text_tower: TextTower
    head: ContrastiveHead

    def __init__(
        self,
        image_encoder: keras.Model,
        text_encoder: keras.Model,
        loss: str | None = None,
        projection_dim: int | None = None,
        head: str | ContrastiveHead = "linear",
        micro_batch_size: int | None = None,
        duplicates: str = "positive",
        pixel_mean: Sequence[float] | None = CLIP_MEAN,
        pixel_std: Sequence[float] = CLIP_STD,
        resize: str = "crop",
        tokenizer: Tokenizer | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        # Each part casts its own inputs. With a mixed policy, the model would cast all
        # weights that it passes to micro-batches. A masking must see pixels in full
        # precision.
        super().__init__(dtype="float32", **kwargs)
        self.autocast = False
        self._held = Untracked(tokenizer=None, embedder=None)
        # `from_backbone` sets it.
        self._backbone = None

        # === Layers ===
        kind = "linear" if isinstance(head, ContrastiveHead) else head
        if kind not in ("linear", "mlp"):
            raise ValueError(
                "`head` must be 'linear', 'mlp' or a `ContrastiveHead`. "
                f"Received: head={head!r}"
            )
        options = {
            "projection_dim": projection_dim,
            "head": kind,
            "dtype": dtype,
            "pixel_mean": pixel_mean,
            "pixel_std": pixel_std,
        }
        towers = image_encoder, text_encoder
        if all(isinstance(x, Tower) for x in towers):
            _check_defaults(options)
        else:
            towers = _new_towers(*towers, **options)
        self.image_tower, self.text_tower = towers
        widths = {x.features_width for x in towers if x.projection is None} - {None}
        if len(widths) > 1:
            raise ValueError(
                "`image_encoder` and `text_encoder` must return features of the same "
                "width: pass `projection_dim` to map both to a common width. Received: "
                f"widths {towers[0].features_width} and {towers[1].features_width}"
            )
        self.head = as_head(head, loss)
        self.head.settle()
        number_positions(self.image_encoder)
        layers = all_layers(self.image_encoder)
        self._held.maskings = [x for x in layers if isinstance(x, PatchMasking)]

        # === Config ===
        self.micro_batch_size = micro_batch_size
        self.duplicates = duplicates
        self.resize = resize
        self.tokenizer = tokenizer
        # Everything is built, unless an encoder learns its width when it is called.
        self.built = all(x.built for x in all_layers(self) if x is not self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and hasattr(self, name):
            raise AttributeError(
                f"`{name}` of a model is fixed: create a new `ContrastiveModel`, which "
                f"may use the same towers and head. Received: {name}={value}"
            )
        if name in CHOICES:
            check_choice(name, value, CHOICES[name])
        elif name == "micro_batch_size":
            value = check_integer(name, value, or_none=True)
        if name == "tokenizer":
            # Keras would track a preprocessor of keras_hub, which adds layers when it
            # is first called.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # === Parts ===

    @property
    def image_encoder(self) -> keras.Model:
        return self.image_tower.encoder

    @property
    def text_encoder(self) -> keras.Model:
        return self.text_tower.encoder

    @property
    def backbone(self) -> keras.Model | None:
        return self._backbone

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._held.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Tokenizer | None) -> None:
        if value is not None:
            check_kind(value)
        self._held.tokenizer = value

    @property
    def maskings(self) -> list[PatchMasking]:
        return self._held.maskings

    @property
    def masking(self) -> PatchMasking | None:
        return next(iter(self.maskings), None)

    @property
    def pixel_mean(self) -> list[float] | None:
        return self.image_tower.pixel_mean

    @property
    def pixel_std(self) -> list[float] | None:
        return self.image_tower.pixel_std

    # === What Keras shows and saves ===

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The towers, the head, and layers of a subclass, with each weight once."""
        return [x for x in super().layers if x is not self.backbone]

    def summary(self, *args: Any, **kwargs: Any) -> None:
        # Keras shows the output shape of a layer that was called on symbols.
        for tower in (self.image_tower, self.text_tower):
            if inputs := inputs_of(tower.encoder):
                tower(inputs if len(inputs) > 1 else next(iter(inputs.values())))
        super().summary(*args, **kwargs)

    def without_masking(self) -> Self:
        """Makes a model with the same weights and no masking, to save it.

        Its file opens in programs that do not have the class of a masking of your own.
        The models share encoders, projections, temperature and bias. To train on whole
        images, set `model.masking.mask_ratio = 0.0` instead.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        half = kcm.RandomMasking(0.5)
        model = kcm.ContrastiveModel.from_backbone(backbone, masking=half)
        model.without_masking().save("model.keras")
        ```

        Returns:
            A model of the same class, not compiled. A subclass is made from its
            `get_config`, as when it is loaded.

        Raises:
            ValueError: If the image encoder has a masking that `kcm.with_masking` did
                not insert, or if a subclass has arguments that its `get_config` omits,
                or weights that the new model would not share.
        """
        config = {**self.get_config(), "head": self.head, "omitted": None}
        if self.backbone is None:
            images = self.image_tower
            config["text_encoder"] = self.text_tower
            config["image_encoder"] = ImageTower(
                images.unmasked_encoder,
                images.projection,
                images.pixel_mean,
                images.pixel_std,
                images.data_format,
                name=images.name,
            )
        else:
            config |= {"backbone": self.backbone, "masking": None}
        known = {*config, *inspect.signature(TwoTowers.__init__).parameters}
        omitted = [
            key
            for key, x in inspect.signature(self.__init__).parameters.items()
            if key not in known and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
        ]
        if omitted:
            raise ValueError(
                f"`get_config` of `{type(self).__name__}` must return all arguments, "
                "so that `from_config` can create the new model. Received: a config "
                f"without {omitted}"
            )
        whole = type(self).from_config(config)
        whole.tokenizer = self.tokenizer
        masks = {id(v) for masking in self.maskings for v in masking.weights}
        if {id(v) for v in self.weights} - masks != {id(v) for v in whole.weights}:
            raise ValueError(
                "A model must have weights only in its towers and head, and its "
                "masking must come from `kcm.with_masking`, so that the masking can be "
                f"removed. Received: a {type(self).__name__} with other weights, and "
                f"maskings {[masking.name for masking in self.maskings]}"
            )
        return whole

    def get_config(self) -> dict[str, Any]:
        if self.backbone is None:
            # The towers, with their projections.
            parts = {"image_encoder": self.image_tower, "text_encoder": self.text_tower}
        else:
            # The model trains the backbone itself, also after it is loaded.
            parts = {"backbone": self.backbone, "masking": self.masking}
            images = self.image_tower
            parts |= {"pixel_mean": images.pixel_mean, "pixel_std": images.pixel_std}
        parts["head"] = self.head
        return {
            "name": self.name,
            **keras.saving.serialize_keras_object(parts),
            "micro_batch_size": self.micro_batch_size,
            "duplicates": self.duplicates,
            "resize": self.resize,
            "omitted": omitted_settings(self),
        }

    # Keras calls both for a `.keras` file. It then saves or loads the assets of each
    # layer that a property returns, such as a tokenizer's.

    def save_assets(self, dir_path: str) -> None:
        """Writes the tokenizer. Keras calls it in `save`."""
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, dir_path)

    def load_assets(self, dir_path: str | None) -> None:
        """Loads the tokenizer. Keras calls it in `keras.saving.load_model`."""
        found = None if dir_path is None else load_tokenizer(dir_path)
        # A subclass may have made its own.
        self.tokenizer = self.tokenizer if found is None else found

    def save_to_preset(
        self, preset_dir: str | os.PathLike, tokenizer: Tokenizer | None = None
    ) -> None:
        """Writes the backbone and its tokenizer as a preset, which keras_hub loads.

        A preset has no pixel mean and deviation, no `resize` and no loss: pass them to
        `from_preset` if they are not those of the backbone's family.

        Args:
            preset_dir: str or path of a folder.
            tokenizer: A `CLIPTokenizer`, or a keras_hub preprocessor. keras_hub does
                not load a Hugging Face tokenizer, but `from_preset` does. Defaults to
                the tokenizer of the model.

        Raises:
            ValueError: If the tokenizer does not match the model, if there is no
                tokenizer, or if the model has no backbone.
        """
        if self.backbone is None:
            raise ValueError(
                "`save_to_preset` is for models of `from_backbone`: save other models "
                f"with `model.save`. Received: model={self.name} without a backbone"
            )
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                "`tokenizer` must be given for a model without one. To save only the "
                "backbone, call `model.backbone.save_to_preset`. Received: "
                "tokenizer=None"
            )
        check_matching_tokenizer(self, tokenizer)
        folder = os.path.expanduser(preset_dir)
        self.backbone.save_to_preset(folder)
        save_in_preset(tokenizer, folder)


# Arguments that belong to towers, and mean nothing for towers that exist.
OF_TOWERS = {
    "projection_dim": None,
    "head": "linear",
    "dtype": None,
    "pixel_mean": CLIP_MEAN,
    "pixel_std": CLIP_STD,
}


def _check_defaults(options):
    given = {k: x for k, x in options.items() if x is not OF_TOWERS[k]}
    if given:
        raise ValueError(
            f"`{'`, `'.join(given)}` must be omitted for a model of two towers, "
            "because the towers define the projections and the pixel statistics. "
            f"Received: {given}"
        )


def _new_towers(images, texts, projection_dim, head, dtype, pixel_mean, pixel_std):
    """Returns towers of two encoders, with new projections."""
    for name, encoder in (("image_encoder", images), ("text_encoder", texts)):
        if not isinstance(encoder, keras.layers.Layer) or isinstance(encoder, Tower):
            raise ValueError(
                f"`{name}` must be a Keras model that returns features, or both "
                f"encoders must be towers. Received: {name}={encoder!r}"
            )
    projections = [None, None]
    if projection_dim is not None:
        width = check_integer("projection_dim", projection_dim)
        names = "image_projection", "text_projection"
        projections = [projection(head, width, dtype, name) for name in names]
    elif head != "linear":
        raise ValueError(
            "`projection_dim` must be given with `head='mlp'`. Received: "
            f"head={head!r}, projection_dim=None"
        )
    return (
        ImageTower(images, projections[0], pixel_mean, pixel_std, name="image_tower"),
        TextTower(texts, projections[1], name="text_tower"),
    )
