import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras

from keras_cluster_mask.distribution.backends import keeping_weights
from keras_cluster_mask.models.head import l2_normalize
from keras_cluster_mask.models.inputs import (
    call_encoder,
    normalize_pixels,
    text_family_of,
    text_input_names,
    text_inputs,
)
from keras_cluster_mask.training.layers import MadeOfParts
from keras_cluster_mask.types import Tensor


class Exported:
    """Base class of models that are exported for inference on batches of any size."""

    def export(
        self,
        filepath: str | os.PathLike,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: list | None = None,
        **kwargs: Any,
    ) -> None:
        """Exports the model for inference on batches of any size.

        Export `image_tower` or `text_tower` for one of the encoders alone.

        Args:
            filepath: Path of the folder or file to write.
            format: As in `keras.Model.export`.
            verbose: As in `keras.Model.export`.
            input_signature: List of one `keras.InputSpec`, or of one dictionary of
                them. Defaults to uint8 images and int32 token ids. Required on torch
                and JAX if the text encoder does not define the length of texts, and on
                torch, with a fixed batch size, for `"onnx"` and `"litert"`.
            **kwargs: As in `keras.Model.export`.
        """
        specs = self.input_specs
        if format == "torch" and "dynamic_shapes" not in kwargs:
            import torch

            # By default, Keras would export for a batch size of 1.
            batch = torch.export.Dim("batch")
            kwargs["dynamic_shapes"] = keras.tree.map_structure(
                lambda x: {0: batch}, specs
            )
        signature = input_signature or [specs]
        super().export(filepath, format, verbose, signature, **kwargs)


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class Tower(MadeOfParts, Exported, keras.Model):
    """Embeds images or texts, for inference.

    `model.image_tower` and `model.text_tower` of a `ContrastiveModel` share its weights
    and compute the same as `encode_image` and `encode_text`, but do not check the
    values of their inputs. Each can be saved separately, and exported for use without
    Keras:

    - on TensorFlow and JAX as a SavedModel, which needs tensorflow:
      `tower.export("folder")`, then `loaded = tf.saved_model.load("folder")` and
      `loaded.serve(images)`;
    - on torch: `tower.export("tower.pt2", format="torch")`, then
      `torch.export.load("tower.pt2").module()(images)`. The image tower of SigLIP needs
      a fixed batch size, because its pooling head cannot be exported without one:
      `dynamic_shapes=None, input_signature=[
      keras.InputSpec(shape=(8, 224, 224, 3), dtype="uint8")]`.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    images = np.random.randint(0, 256, (4, 32, 32, 3)).astype("uint8")
    model.image_tower.predict(images).shape  # (4, 96)
    model.image_tower.save("image_tower.keras")
    ```

    Args:
        encoder: A functional Keras model from images or token ids to `(batch, d)`
            features.
        pixel_mean: Mean of each channel, used to normalize uint8 images. `None` for
            texts, and for images that are not normalized.
        pixel_std: Standard deviation of each channel.
        data_format: `"channels_last"` or `"channels_first"` for images, `None` for
            texts.
        **kwargs: Arguments of `keras.Model`.

    Call arguments:
        inputs: `(batch, H, W, C)` images, uint8 or normalized floats, or `(batch, T)`
            token ids, or a dictionary of inputs if the text encoder has several.

    Returns:
        `(batch, d)` float32 embeddings, L2-normalized.
    """

    parts = ("encoder", "pixel_mean", "pixel_std", "data_format")

    def __init__(
        self,
        encoder: keras.Model,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        data_format: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        # The layers of the encoder cast their own inputs.
        self.autocast = encoder.autocast = False
        self.encoder = encoder
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.data_format = data_format
        self.built = True

    @classmethod
    def of(
        cls, encoder: keras.Model, project: Callable[[Any], Tensor], **kwargs: Any
    ) -> Self:
        """Makes a tower.

        Args:
            encoder: One of the encoders of a `ContrastiveModel`.
            project: Function from inputs of the encoder to projected features.
            **kwargs: Further arguments of the tower.
        """
        # Some encoders have no `input`. After Keras's AttributeError, torch would
        # report that the attribute `image_tower` is missing.
        given = getattr(encoder, "input", None)
        if given is None:
            raise ValueError(
                "A tower can only be made of a functional encoder, whose inputs are "
                f"known. Received: {encoder.name} of type {type(encoder).__name__}"
            )
        length = getattr(encoder, "max_sequence_length", None)
        inputs = [
            keras.Input(
                (length,) if x.shape[1:] == (None,) else x.shape[1:],
                dtype=x.dtype,
                name=x.name,
            )
            for x in keras.tree.flatten(given)
        ]
        inputs = {x.name: x for x in inputs} if len(inputs) > 1 else inputs[0]
        return cls(keras.Model(inputs, project(inputs)), **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        if self.data_format is not None:
            inputs = normalize_pixels(
                inputs, self.pixel_mean, self.pixel_std, self.data_format
            )
        else:
            names, family = text_input_names(self.encoder), text_family_of(self.encoder)
            inputs = text_inputs(names, family, inputs)
        return l2_normalize(call_encoder(self.encoder, inputs, training=False))

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        # The weights belong to a model that may be trained further.
        with keeping_weights(self):
            return super().predict(x, *args, **kwargs)

    @property
    def input_specs(self) -> Any:
        """The `keras.InputSpec` of the input, or a dictionary of them."""
        dtype = None if self.pixel_mean is None else "uint8"
        return keras.tree.map_structure(
            lambda x: keras.InputSpec(shape=x.shape, dtype=dtype or x.dtype),
            self.encoder.input,
        )
