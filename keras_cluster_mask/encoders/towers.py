"""A tower: from images or texts to embeddings in the space that both share."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_cluster_mask.distribution.backends import exports_one_length, keeping_weights
from keras_cluster_mask.distribution.replicas import OwnReduction, local_rows
from keras_cluster_mask.encoders.exported import Exported
from keras_cluster_mask.encoders.families import CLIP_MEAN, CLIP_STD, text_family_of
from keras_cluster_mask.encoders.masked import MaskedEncoder, unmasked
from keras_cluster_mask.encoders.pixels import check_statistics, pixel_range
from keras_cluster_mask.encoders.surgery import (
    context_length_of,
    data_format_of,
    image_shape_of,
    inputs_of,
)
from keras_cluster_mask.encoders.text_lengths import TextLengths, lengths_of_encoder
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.masking.patch_grid import height_and_width
from keras_cluster_mask.training.input_rules import is_float
from keras_cluster_mask.training.layers import (
    MadeOfParts,
    all_layers,
    as_functional,
)
from keras_cluster_mask.types import Tensor


class Tower(OwnReduction, MadeOfParts, Exported, keras.Model):
    """Embeds images or texts: the base class of `ImageTower` and `TextTower`.

    Args:
        encoder: A Keras model from inputs to `(batch, width)` features.
        projection: A layer from features to `(batch, d)`, or `None`.
        **kwargs: Arguments of `keras.Model`.

    Attributes:
        features_width: Integer, or `None` if it is not known when the tower is made.
        has_masking: Boolean.
        sample_shape: Tuple, the shape of the encoder's first input without the batch;
            `None` if it is not known when the tower is made.

    Call arguments:
        inputs: `(batch, H, W, C)` images, uint8 or normalized floats; or `(batch, T)`
            token ids, or a dictionary of inputs if the text encoder has several.

    Returns:
        `(batch, d)` float32 embeddings, L2-normalized.
    """

    _arguments: tuple[str, ...] = ("encoder", "projection")

    def __init__(
        self,
        encoder: keras.Model,
        projection: keras.layers.Layer | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        # The layers of the encoder cast their own inputs.
        self.autocast = False
        self.encoder = encoder = as_functional(encoder)
        self.projection = projection
        self.sample_shape = image_shape_of(encoder)
        output = getattr(encoder, "output", None)
        self.features_width = getattr(output, "shape", (None,))[-1]
        if None not in (projection, self.features_width) and not projection.built:
            projection.build((None, self.features_width))
        self.has_masking = any(isinstance(x, PatchMasking) for x in all_layers(encoder))
        self._compiled_for: tuple[int, ...] = ()
        self.built = True

    def prepare(self, inputs: Any) -> Any:
        """Returns the inputs of the encoder."""
        raise NotImplementedError

    def features(
        self,
        inputs: Any,
        training: bool | None = False,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Computes the `(batch, width)` features that the projection takes.

        Args:
            inputs: As for a call of the tower.
            training: Boolean. A frozen encoder without a masking runs as in inference,
                since dropout would change its features.
            noise: `(batch, N)` tensor, the noise for the masking of the encoder.
        """
        encoder = self.encoder
        is_frozen = encoder.weights and not encoder.trainable_weights
        if training and is_frozen and not self.has_masking:
            training = False
        inputs, names = self.prepare(inputs), getattr(encoder, "input", None)
        if isinstance(names, dict) and len(names) == 1:
            inputs = dict.fromkeys(names, inputs)
        options = {} if noise is None else {"noise": noise}
        features = encoder(inputs, training=training, **options)
        if len(getattr(features, "shape", ())) != 2:
            raise ValueError(
                "An encoder must return features of shape (batch, d): add a pooling "
                f"layer to an encoder that returns tokens. Received: {encoder.name} "
                f"returned {getattr(features, 'shape', type(features).__name__)}"
            )
        return features

    def project(self, features: Tensor, training: bool | None = False) -> Tensor:
        """Projects features to `(batch, d)` float32 embeddings, L2-normalized."""
        if self.projection is not None:
            # It is passed `training`: Keras knows it within a call of the model, but
            # not while the backward pass recomputes a micro-batch.
            features = self.projection(features, training=training)
        return l2_normalize(features)

    def embed(
        self, inputs: Any, training: bool | None = False, **options: Any
    ) -> Tensor:
        """Computes embeddings; see `features`, of which it takes the arguments."""
        return self.project(self.features(inputs, training, **options), training)

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        return self.embed(inputs)

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None
    ) -> keras.KerasTensor:
        # Not by a call, since texts of unknown length could be too long for it.
        shape = (None, self.features_width)
        if self.projection is not None:
            shape = self.projection.compute_output_shape(shape)
        return keras.KerasTensor(shape, dtype="float32")

    def make_predict_function(self, force: bool = False) -> Any:
        # Quantization and LoRA replace weights, or add some.
        weights = tuple(map(id, self.weights))
        if weights != self._compiled_for:
            self.predict_function, self._compiled_for = None, weights
        return super().make_predict_function(force)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        # The weights belong to a model that may be trained further.
        with keeping_weights(self):
            return super().predict(x, *args, **kwargs)

    @property
    def input_specs(self) -> Any:
        """The `keras.InputSpec` of the input, or a dictionary of them."""
        given = inputs_of(self.encoder)
        if not given:
            raise ValueError(
                "Only a tower with a functional encoder, which has known inputs, can "
                f"be exported. Received: {self.encoder.name} of type "
                f"{type(self.encoder).__name__}"
            )
        specs = {name: self._spec(x) for name, x in given.items()}
        return specs if len(specs) > 1 else specs.popitem()[1]

    def _spec(self, given):
        return keras.InputSpec(given.dtype, given.shape, name=given.name)


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ImageTower(Tower):
    """Embeds images: an image encoder and a projection.

    `model.image_tower` and `model.text_tower` of a `ContrastiveModel` compute the same
    as its `encode_image` and `encode_text`, but do not check the values of their
    inputs. A model can be made of two towers: of those of another model, to share
    weights, or of new ones, with projections of your own. Each tower can be saved
    separately, and exported for use without Keras:

    - on TensorFlow and JAX as a SavedModel, which needs tensorflow:
      `tower.export("folder")`, then `loaded = tf.saved_model.load("folder")` and
      `loaded.serve(images)`;
    - on torch: `tower.export("tower.pt2", format="torch")`, then
      `torch.export.load("tower.pt2").module()(images)`. The image tower of SigLIP needs
      a fixed batch size, because its pooling head cannot be exported without one:
      `input_signature=[keras.InputSpec(shape=(8, 224, 224, 3), dtype="uint8")]`;
    - on torch and TensorFlow as ONNX: `tower.export("tower.onnx", format="onnx")`, then
      `onnxruntime.InferenceSession("tower.onnx").run(None, {"images": images})`.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    images = np.random.randint(0, 256, (4, 32, 32, 3)).astype("uint8")
    model.image_tower.predict(images).shape  # (4, 96)
    model.image_tower.save("image_tower.keras")

    # Other projections of the same encoders.
    image_tower = kcm.models.ImageTower(model.image_encoder, keras.layers.Dense(8))
    text_tower = kcm.models.TextTower(model.text_encoder, keras.layers.Dense(8))
    other = kcm.ContrastiveModel(image_tower, text_tower)
    other.encode_image(images).shape  # (4, 8)
    ```

    Args:
        encoder: A Keras model from images to `(batch, width)` features.
        projection: A layer from features to `(batch, d)`, or `None`.
        pixel_mean: Mean of each channel, used to normalize uint8 images. `None` for
            images that are not normalized.
        pixel_std: Standard deviation of each channel.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to the encoder's
            format.
        **kwargs: Arguments of `keras.Model`.

    Attributes:
        image_size: `(height, width)` of the images, each `None` if the encoder accepts
            any size or does not define one.
        pixel_range: Two floats, the values of a black and a white pixel after
            normalization; `None` for images that are not normalized.
    """

    _arguments = (*Tower._arguments, "pixel_mean", "pixel_std", "data_format")

    def __init__(
        self,
        encoder: keras.Model,
        projection: keras.layers.Layer | None = None,
        pixel_mean: Sequence[float] | None = CLIP_MEAN,
        pixel_std: Sequence[float] | None = CLIP_STD,
        data_format: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(encoder, projection, **kwargs)
        check_statistics(pixel_mean, pixel_std, encoder)
        self.pixel_mean = None if pixel_mean is None else [*map(float, pixel_mean)]
        self.pixel_std = None if pixel_std is None else [*map(float, pixel_std)]
        self.data_format = data_format or data_format_of(self.unmasked_encoder)
        self.pixel_range = pixel_range(pixel_mean, pixel_std)
        self.image_size = (None, None)
        if self.sample_shape is not None:
            self.image_size = height_and_width(self.sample_shape, self.data_format)

    @property
    def unmasked_encoder(self) -> keras.Model:
        """The encoder without the masking that `kcm.with_masking` inserted."""
        return unmasked(self.encoder)

    def draw_noise(self, images: Tensor, batch_size: Any = None) -> Tensor | None:
        """Draws the noise of a step, for the masking of `kcm.with_masking`.

        It is drawn for the whole batch, so a mask does not depend on the number of
        devices or micro-batches.

        Args:
            images: `(rows, H, W, C)` tensor, the images of this replica.
            batch_size: Integer, the number of images of all replicas. Defaults to that
                of `images`.

        Returns:
            `(rows, N)` tensor of this replica's rows; `None` without such a masking, or
            for whole images.
        """
        encoder = self.encoder
        if not isinstance(encoder, MaskedEncoder) or not encoder.masking.mask_ratio:
            return None
        size = ops.shape(images)[0] if batch_size is None else batch_size
        return local_rows(encoder.masking.draw(size, encoder.num_patches(images)))

    def prepare(self, inputs: Any) -> Tensor:
        """Returns normalized images, as the encoder and its masking take them."""
        statistics = self.pixel_mean, self.pixel_std
        return normalize_pixels(inputs, *statistics, self.data_format)

    def _spec(self, given):
        dtype = given.dtype if self.pixel_mean is None else "uint8"
        return keras.InputSpec(dtype, given.shape, name="images")


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class TextTower(Tower):
    """Embeds texts: a text encoder and a projection, as `ImageTower` is of images.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    token_ids = np.random.randint(1, 100, (4, 12)).astype("int32")
    model.text_tower.predict(token_ids).shape  # (4, 96)
    ```

    Args:
        encoder: A Keras model from token ids, or from several inputs, to
            `(batch, width)` features. A single input may have any name. If there are
            several, one must be named `"token_ids"`.
        projection: A layer from features to `(batch, d)`, or `None`.
        context_length: Integer, the maximum number of tokens of a text. Defaults to the
            encoder's length.
        **kwargs: Arguments of `keras.Model`.

    Attributes:
        input_names: Tuple of str, the names of the encoder's inputs.
        takes_any_length: Boolean. Whether the inputs have no fixed number of tokens.
        family: The `TextFamily` of the encoder.

    Raises:
        ValueError: If none of several inputs is `"token_ids"`.
    """

    _arguments = (*Tower._arguments, "context_length")

    def __init__(
        self,
        encoder: keras.Model,
        projection: keras.layers.Layer | None = None,
        context_length: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(encoder, projection, **kwargs)
        given = inputs_of(encoder)
        names = tuple(given)
        if len(names) > 1 and "token_ids" not in names:
            raise ValueError(
                "`text_encoder` must have one input, or inputs named like the entries "
                f"of a batch, including 'token_ids'. Received: inputs {[*names]}"
            )
        self.input_names = names if len(names) > 1 else ("token_ids",)
        self.takes_any_length = {x.shape for x in given.values()} == {(None, None)}
        self.family = text_family_of(encoder)
        self.context_length = context_length or context_length_of(encoder)

    @functools.cached_property
    def lengths(self) -> TextLengths:
        """The `TextLengths` of the encoder, which cuts padding off.

        Read it outside of a compiled step: an unknown encoder is tested once.
        """
        return lengths_of_encoder(self)

    def prepare(self, inputs: Any) -> Any:
        """Returns ids, or a dictionary of the inputs of the encoder.

        For a BERT encoder, missing inputs are made from the ids. The `"padding_mask"`
        hides padding; `InputRules` refuses ids of padding between others. The
        `"segment_ids"` are 0, because a caption is one segment.

        Args:
            inputs: `(batch, T)` token ids, or a dictionary of inputs by name.

        Raises:
            ValueError: If an input is missing, or the encoder does not have it, or if
                the encoder cannot take the number of tokens.
        """
        names = self.input_names
        given = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
        inputs = {name: ops.convert_to_tensor(value) for name, value in given.items()}
        if "token_ids" in inputs:
            ids = inputs["token_ids"]
            if "padding_mask" in names and "padding_mask" not in inputs:
                is_word = ops.not_equal(ids, self.family.padding_id)
                inputs["padding_mask"] = ops.cast(is_word, "int32")
            if "segment_ids" in names and "segment_ids" not in inputs:
                inputs["segment_ids"] = ops.zeros_like(ids)
        if inputs.keys() != {*names}:
            missing = [name for name in names if name not in inputs]
            raise ValueError(
                "`token_ids` must be an array of ids, or a dictionary of exactly the "
                f"inputs of the text encoder, {[*names]}; missing: {missing}. "
                f"Received: keys={sorted(given)}"
            )
        length, most = ids.shape[1], self.context_length
        least = most if self.family.pooling == "last token" else 0
        # It is no integer while a model is exported for texts of any length.
        if most and isinstance(length, int) and not least <= length <= most:
            raise ValueError(
                f"`token_ids` must have {'' if least else 'at most '}{most} tokens for "
                f"each text: {'pad' if least else 'truncate'} texts, as the tokenizer "
                f"of the model does. Received: {length} tokens"
            )
        return inputs if len(names) > 1 else ids

    def _spec(self, given):
        shape = given.shape
        if self.family.pooling == "last token" or exports_one_length():
            shape = (shape[0], self.context_length)
        return keras.InputSpec(given.dtype, shape, name=given.name)


def normalize_pixels(images, mean=CLIP_MEAN, std=CLIP_STD, data_format=None):
    """Scales and normalizes uint8 images, and returns float images unchanged.

    This runs on the device, in the compiled step, because uint8 takes a quarter of the
    memory and of the transfer of float32.

    Args:
        images: `(batch, H, W, C)` tensor, or channels first.
        mean: Three floats, one per channel. Their average is used if there are not
            three channels. `None` returns all images unchanged.
        std: Three floats, one per channel, averaged like `mean`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.

    Returns:
        A float32 tensor for uint8 images; any other tensor unchanged.

    Raises:
        ValueError: For integers other than uint8, which have no known range.
    """
    images = ops.convert_to_tensor(images)
    dtype = keras.backend.standardize_dtype(images.dtype)
    # `is_float` raises an error for other integers.
    if mean is None or (dtype != "uint8" and is_float(images)):
        return images
    data_format = data_format or keras.config.image_data_format()
    axis, shape = (1, (-1, 1, 1)) if data_format == "channels_first" else (-1, -1)
    if images.shape[axis] != 3:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    # Tensors of Python numbers: torch compiles and exports no NumPy arrays.
    mean, std = (
        ops.reshape(ops.convert_to_tensor(x, "float32"), shape) for x in (mean, std)
    )
    return (ops.cast(images, "float32") / 255.0 - mean) / std


def l2_normalize(features):
    """Scales rows to length 1 in float32, with a finite gradient at 0."""
    # `keras.ops.normalize` has a NaN gradient at a zero vector on JAX and torch.
    x = ops.cast(features, "float32")
    length = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return x * ops.rsqrt(ops.maximum(length, 1e-12))
