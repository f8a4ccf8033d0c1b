"""The inputs of encoders: normalized pixels, token ids by family, and calls."""

import dataclasses
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_cluster_mask.models.encoders import image_shape_of
from keras_cluster_mask.training.input_rules import is_float
from keras_cluster_mask.training.layers import all_layers
from keras_cluster_mask.types import Tensor

# Channel statistics that OpenAI trained CLIP with, for values in [0, 1]
# (https://github.com/openai/CLIP, clip/clip.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# SigLIP's images are in [-1, 1] (https://github.com/google-research/big_vision,
# `value_range(-1, 1)` in its configurations).
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
# ImageNet's, which DeiT and DINO were trained with
# (https://github.com/facebookresearch/dinov2, dinov2/data/transforms.py).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The files of image processors that transformers writes into a folder. Newer versions
# write the second one, which holds the first under "image_processor".
PREPROCESSING_FILES = "preprocessor_config.json", "processor_config.json"


def image_processor_entries(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries that one of `PREPROCESSING_FILES` gives, as they are used."""
    config = config.get("image_processor", config)
    # A flag of null is off. Any other null stands for the default.
    flags = "do_normalize", "do_rescale"
    given = {k: x for k, x in config.items() if x is not None or k in flags}
    if not given.get("do_normalize", True):
        given.update(image_mean=0.0, image_std=1.0)
    return given


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
        ValueError: For integers other than uint8, whose range is not known.
    """
    images = ops.convert_to_tensor(images)
    dtype = keras.backend.standardize_dtype(images.dtype)
    # `is_float` raises an error for other integers.
    if (
        mean is None
        or keras.backend.is_float_dtype(dtype)
        or (dtype != "uint8" and is_float(images))
    ):
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


def check_statistics(mean, std, encoder):
    """Raises an error unless a mean and a standard deviation can normalize pixels.

    Warns of an image encoder that normalizes its images again, where it is known.
    """
    if mean is None:
        return
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        values = np.array(values, "float64")
        is_valid = np.isfinite(values) & ((values > 0) | (name == "pixel_mean"))
        if values.shape != (3,) or not np.all(is_valid):
            raise ValueError(
                f"`{name}` must be three finite numbers, and `pixel_std` greater than "
                f"0. Received: {name}={values}"
            )
    given = tree.flatten(getattr(encoder, "input", None))[0]
    if given is not None and not keras.backend.is_float_dtype(given.dtype):
        raise ValueError(
            "`pixel_mean` must be None for an image encoder of integer images, because "
            "normalized pixels would be cast to integers. "
            f"Received: pixel_mean={mean}, an image encoder of {given.dtype} images"
        )
    for layer in all_layers(encoder):
        if isinstance(layer, keras.layers.Normalization | keras.layers.Rescaling):
            shape = (layer.get_build_config() or {}).get("input_shape", ())
            if tuple(shape[1:]) == image_shape_of(encoder):
                warnings.warn(
                    "The model normalizes images, and so does its image encoder: pass "
                    "`pixel_mean=None` for one that takes pixels from 0 to 255. "
                    f"Received: pixel_mean={mean}, the encoder's layer {layer.name!r}",
                    stacklevel=5,
                )


def pixel_range(mean, std):
    """Returns the values of a black and a white pixel after normalization.

    Returns:
        Two floats, the lowest and the highest of all channels; `None` without a mean.
    """
    if mean is None:
        return None
    mean, std = np.array(mean), np.array(std)
    return float(np.min(-mean / std)), float(np.max((1.0 - mean) / std))


# === Texts ===


@dataclasses.dataclass(frozen=True)
class TextFamily:
    """How the text encoders of a family treat token ids.

    Attributes:
        layer: String, the class name of the keras_hub layer, or backbone, that only
            this family has.
        pooling: `"highest id"`, `"end token"` (the first one), `"last token"` of texts
            that all have the full length, or `"all tokens"`. The features depend on the
            tokens up to the pooled one; in the last two cases, on all.
        end_id: Integer, the id of the end token that every text must have, or `None`.
        padding_id: Integer, the id that is hidden as padding. Only an encoder with the
            input `"padding_mask"` hides any.
    """

    layer: str | None = None
    pooling: str = "all tokens"
    end_id: int | None = None
    padding_id: int = 0

    def is_pooled(self, token_ids: Any) -> Tensor | None:
        """Returns which token of each text is pooled; `None` if all are read.

        Args:
            token_ids: `(batch, T)` ints.

        Returns:
            `(batch, T)` booleans. A text without the end token has no true value.
        """
        if self.pooling == "highest id":
            highest = ops.max(token_ids, axis=1, keepdims=True)
            is_end = ops.equal(token_ids, highest)
        elif self.pooling == "end token":
            is_end = ops.equal(token_ids, self.end_id)
        else:
            return None
        # The first of them.
        counts = ops.cumsum(ops.cast(is_end, "int32"), axis=1)
        return ops.logical_and(is_end, ops.equal(counts, 1))


# By the prefix of keras_hub's class names. Any other encoder, such as BERT, has the
# defaults.
TEXT_FAMILIES = {
    "CLIP": TextFamily("CLIPTextPooler", "highest id"),
    # keras_hub does not save another id than 2.
    "MetaCLIP2": TextFamily("MetaCLIP2TextPooler", "end token", end_id=2),
    # The last token attends to all others, padding included.
    "SigLIP": TextFamily("SigLIPTextEncoder", "last token"),
    "RoBERTa": TextFamily("RobertaBackbone", padding_id=1),
    "XLM-R": TextFamily("XLMRobertaBackbone", padding_id=1),
}


def text_family_of(model: keras.layers.Layer) -> TextFamily:
    """Returns the family of a text encoder, or of the backbone that contains one."""
    parts = *all_layers(model), getattr(model, "backbone", model)
    layers = {type(part).__name__: part for part in parts}
    for family in TEXT_FAMILIES.values():
        if family.layer in layers:
            end = getattr(layers[family.layer], "eos_token_id", family.end_id)
            return dataclasses.replace(family, end_id=end)
    return TextFamily()


def text_input_names(encoder: keras.layers.Layer) -> tuple[str, ...]:
    """Returns the names of a text encoder's inputs.

    Args:
        encoder: A Keras model. A single input may have any name. If there are several,
            one must be named `"token_ids"`.

    Returns:
        A tuple of str.

    Raises:
        ValueError: If none of several inputs is `"token_ids"`.
    """
    inputs = getattr(encoder, "input", None)
    names = tuple(inputs) if isinstance(inputs, dict) else ()
    names = names or tuple(x.name for x in tree.flatten(inputs) if x is not None)
    if len(names) < 2:
        return ("token_ids",)
    if "token_ids" not in names:
        raise ValueError(
            "`text_encoder` must have one input, or inputs that are named as the "
            "entries of a batch, 'token_ids' among them. "
            f"Received: inputs {[*names]}"
        )
    return names


def text_inputs(names: tuple[str, ...], family: TextFamily, given: Any) -> Any:
    """Returns the inputs to call a text encoder on: ids, or a dictionary of inputs.

    For a BERT encoder, missing inputs are made from the ids. The `"padding_mask"` hides
    padding; `InputRules` refuses ids of padding between others. The `"segment_ids"` are
    0, because a caption is one segment.

    Args:
        names: The names of the encoder's inputs.
        family: The family of the encoder.
        given: `(batch, T)` token ids, or a dictionary of inputs by name.

    Returns:
        A tensor, or a dictionary of tensors.

    Raises:
        ValueError: If an input is missing, or the encoder does not have it.
    """
    given = given if isinstance(given, dict) else {"token_ids": given}
    inputs = {name: ops.convert_to_tensor(value) for name, value in given.items()}
    if "token_ids" in inputs:
        ids = inputs["token_ids"]
        if "padding_mask" in names and "padding_mask" not in inputs:
            is_word = ops.not_equal(ids, family.padding_id)
            inputs["padding_mask"] = ops.cast(is_word, "int32")
        if "segment_ids" in names and "segment_ids" not in inputs:
            inputs["segment_ids"] = ops.zeros_like(ids)
    if inputs.keys() != {*names}:
        missing = [name for name in names if name not in inputs]
        raise ValueError(
            "`token_ids` must be an array of ids, or a dictionary of the inputs of the "
            f"text encoder, {[*names]}; missing: {missing}. "
            f"Received: keys={sorted(given)}"
        )
    return inputs if len(names) > 1 else ids


# === Calls ===


def call_encoder(encoder, value, training):
    """Calls an encoder on a tensor, or on a dictionary of inputs by name."""
    if training is False:
        # A functional model for inference, such as a tower, should have no masking.
        encoder = getattr(encoder, "unmasked", encoder)
    inputs = getattr(encoder, "input", None)
    if isinstance(value, dict):
        if not isinstance(inputs, dict):
            value = [value[x.name] for x in tree.flatten(inputs)]
            value = tree.pack_sequence_as(inputs, value)
    elif isinstance(inputs, dict) and len(inputs) == 1:
        value = dict.fromkeys(inputs, value)
    return encoder(value, training=training)
