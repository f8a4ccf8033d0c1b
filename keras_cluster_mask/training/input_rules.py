"""Rules for the batches of a model, checked on the host before the model runs."""

import contextlib
import dataclasses
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.batches import (
    as_array,
    check_equal_lengths,
    is_tf_dataset,
)
from keras_cluster_mask.checks import fits_shape

KEYS = ("images", "token_ids")
# Inputs of a text encoder that are made from the token ids if a batch lacks them.
MADE = ("padding_mask", "segment_ids")
LONELY = (
    "A batch must contain at least two pairs, because a contrastive loss compares the "
    "pairs of a batch: use a larger `batch_size`."
)
NO_LABELS = (
    "a contrastive loss needs no labels. Pass pairs as {'images': images, 'token_ids': "
    "tokenizer(captions)}, and image files with captions as an `image_text_dataset` of "
    "[{'image': path, 'caption': caption}, ...]. To weight pairs, add 'sample_weight' "
    "to the batches."
)
# Non-negative float images above this multiple of the brightest normalized pixel count
# as unnormalized. Resizing after normalization may exceed that pixel slightly.
MARGIN = 3.0
# No normalization gives values above this multiple of the brightest or darkest pixel's.
LIMIT = 10.0


@dataclasses.dataclass
class InputRules:
    """Checks that a model can use the images, token ids and weights of batches.

    Data is checked before it reaches a step. Calls of the model check only the form of
    a batch, since a user may pass one directly.

    Attributes:
        text_inputs: Tuple of str, the entries that the text encoder takes.
        image_shape: Tuple, the shape of images without the batch, or `None`.
        text_shape: Tuple, the shape of token ids without the batch, or `None`.
        context_length: Integer, the maximum number of token ids per text, or `None`.
        vocabulary_size: Integer, the number of token ids, or `None` if unknown.
        end_token_id: Integer, the id that every text must contain, or `None`.
        padding_id: Integer, the id that is hidden as padding if there is no
            `"padding_mask"`, or `None`.
        pixel_range: Two floats, the values of a black and a white pixel after
            normalization; `None` for a model that does not normalize images.
        lengths: The `TextLengths` of the text encoder, or `None` to cut no padding off.
        training: Boolean. Whether the batches are for training.
        chunk_size: Integer, the number of pairs of a micro-batch in this process.
    """

    text_inputs: tuple[str, ...] = ("token_ids",)
    image_shape: tuple | None = None
    text_shape: tuple | None = None
    context_length: int | None = None
    vocabulary_size: int | None = None
    end_token_id: int | None = None
    padding_id: int | None = None
    pixel_range: tuple[float, float] | None = None
    lengths: Any = None
    training: bool = False
    chunk_size: int = 1

    def check(self, batch) -> None:
        """Checks a batch of data that Keras reads.

        Args:
            batch: A dictionary, or a tuple as in Keras; see `as_dictionary`.
        """
        numbers = self.check_keys(as_dictionary(batch), warns=False)
        entries, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        others = [name for name, values in entries.items() if not is_numeric(values)]
        if others:
            raise ValueError(
                "Each entry of a batch must be an array of numbers: convert lists to "
                "arrays, and remove other entries, such as file names. Received: "
                f"entries {sorted(others)}, which are not arrays of numbers"
            )
        self.check_values(numbers)

    def check_arrays(self, arrays) -> dict[str, Any]:
        """Checks a dictionary of arrays; see `check_keys` for what it returns."""
        arrays = self.check_keys(arrays)
        self.check_values(arrays)
        return arrays

    def cut(self, batch, xp=np):
        """Cuts off the padding after the longest text of a batch; see `TextLengths`."""
        return batch if self.lengths is None else self.lengths.cut(batch, xp)

    def check_keys(self, batch, warns=True):
        """Raises an error if a batch does not have the entries that it must have.

        Args:
            batch: Dictionary, from the names of the entries to anything.
            warns: Boolean. Whether a warning lists the entries that are dropped.

        Returns:
            The batch without what no input takes, such as captions.
        """
        is_dictionary = isinstance(batch, dict)
        if is_dictionary and "sample_weights" in batch:
            raise ValueError(
                "Weights of pairs must have the key 'sample_weight', not "
                f"'sample_weights'. Received: keys={sorted(batch)}"
            )
        keys = "images", *(x for x in self.text_inputs if x not in MADE)
        missing = [x for x in keys if not is_dictionary or x not in batch]
        if missing:
            found = f"keys={sorted(batch)}" if is_dictionary else f"{type(batch)}"
            raise ValueError(
                "`inputs`, and each batch of data, must be a dictionary with the keys "
                f"{' and '.join(map(repr, keys))}; missing: {missing}. "
                f"Received: {found}"
            )
        known = {"images", "sample_weight", *self.text_inputs}
        numbers = {k: v for k, v in batch.items() if k in known or is_numeric(v)}
        if warns and len(numbers) < len(batch):
            warnings.warn(
                "Entries of a batch that are not arrays of numbers do not reach the "
                f"model. Received: {sorted(batch.keys() - numbers.keys())}",
                stacklevel=2,
            )
        self.check_texts(numbers)
        return numbers

    def check_texts(self, batch):
        """Raises an error for an entry that looks like an input of the text encoder.

        Other numbers may be used by a `compute_loss` of the user's own.
        """
        shapes = {}
        for name, values in batch.items():
            # Lists have no shape, and a TensorFlow tensor may have an unknown shape.
            with contextlib.suppress(AttributeError, ValueError):
                shapes[name] = tuple(values.shape)
        shape, inputs = shapes.get("token_ids", ()), self.text_inputs
        wrong = [k for k in shapes if k not in inputs and shapes[k] == shape]
        if wrong and len(shape) == 2:
            raise ValueError(
                "An entry with the shape of 'token_ids' must have the name of an input "
                f"of the text encoder, one of {[*inputs]}: rename the entry, or remove "
                f"it from the batch. Received: {wrong} of shape {shape}"
            )

    def check_values(self, batch):
        """Raises an error if the model cannot use the values of a batch.

        Args:
            batch: Dictionary of arrays.
        """
        # Weights have a rule of their own, and scalars belong to no pair.
        paired = {
            name: values
            for name, values in batch.items()
            if name != "sample_weight" and getattr(values, "shape", None) != ()
        }
        check_equal_lengths(paired)
        self.check_ids(batch["token_ids"], has_mask="padding_mask" in batch)
        rows = len(batch["token_ids"])
        if "sample_weight" in batch:
            weights = as_array(batch["sample_weight"])
            is_valid = np.isfinite(weights) & (weights >= 0)
            if weights.shape != (rows,) or not np.all(is_valid):
                raise ValueError(
                    f"`sample_weight` must be {rows} finite numbers of at least 0, one "
                    f"per pair. Received: sample_weight={weights}"
                )
        if self.training and rows < 2:
            raise ValueError(f"{LONELY} Received: a batch of {rows}")
        if self.training and rows % self.chunk_size:
            raise ValueError(
                "`micro_batch_size` must divide the size of every batch: drop a "
                "smaller last batch, or set another `micro_batch_size`. Received: "
                f"micro-batches of {self.chunk_size} pairs in each process, a batch of "
                f"{rows}"
            )
        self.check_images(batch["images"])

    def check_ids(self, ids, has_mask=False):
        """Raises an error if a text encoder cannot take the token ids.

        Args:
            ids: `(batch, T)` ints.
            has_mask: Boolean. Whether the batch has a padding mask.
        """
        ids, longest = as_array(ids), self.context_length
        expected = (None, *(self.text_shape or (None,)))
        fits = ids.dtype.kind in "iu" and fits_shape(ids.shape, expected)
        fits = fits and (ids.shape[1] > 0 or not len(ids))
        if not fits or (longest is not None and ids.shape[1] > longest):
            most = "" if longest is None else f", of at most {longest} columns"
            raise ValueError(
                f"`token_ids` must be integers of shape {expected}{most}, as "
                "`tokenizer(texts)` returns. The `context_length` of the tokenizer "
                "must match the text encoder: `kcm.models.with_context_length` changes "
                f"the encoder. Received: token_ids of type {ids.dtype} and shape "
                f"{ids.shape}"
            )
        low, high = (ids.min(), ids.max()) if ids.size else (0, 0)
        size = self.vocabulary_size
        if size is not None and (low < 0 or high >= size):
            raise ValueError(
                f"`token_ids` must be in the text encoder's vocabulary, [0, {size}): "
                f"use the tokenizer of the text encoder. Received: ids from {low} to "
                f"{high}"
            )
        if self.end_token_id is not None:
            without = ~np.any(ids == self.end_token_id, axis=-1)
            _raise_for_rows(
                without,
                f"`token_ids` must contain the end token, {self.end_token_id}, in "
                "every row, because texts are pooled there. Truncate texts before the "
                "end token is added.",
            )
        if self.padding_id is not None and not has_mask:
            is_padding = ids == self.padding_id
            inner = is_padding[:, :-1] & ~is_padding[:, 1:]
            _raise_for_rows(
                np.any(inner, axis=1) | np.any(is_padding[:, :1], axis=1),
                "`padding_mask` must be in the batch, because the padding id, "
                f"{self.padding_id}, is not only at the end of texts. Without a mask, "
                "all padding ids are hidden.",
            )

    def check_images(self, images):
        """Raises an error for images that the encoder does not take.

        Args:
            images: `(batch, ...)` images, or a spec with their shape and dtype.
        """
        images = images if hasattr(images, "dtype") else as_array(images)
        expected, shape = self.image_shape, tuple(images.shape)
        if expected is not None and not fits_shape(shape, (None, *expected)):
            raise ValueError(
                f"`images` must have shape {(None, *expected)}: match the `image_size` "
                "of the data to the encoder, or change the encoder with "
                f"`kcm.models.with_image_size`. Received: images.shape={shape}"
            )
        if self.pixel_range is None or not is_float(images):
            return
        # A spec has no values.
        if not hasattr(images, "__array__") or not (images := as_array(images)).size:
            return
        low, high = float(images.min()), float(images.max())
        black, white = self.pixel_range
        # False for a constant batch, and for one with NaN.
        is_within = 0 <= low < high
        # Not if normalized pixels themselves may lie in [0, 1].
        is_scaled = high <= 1 and black < 0
        is_pixels = is_within and (is_scaled or high > MARGIN * white)
        if is_pixels or max(-low, high) > LIMIT * max(-black, white):
            raise ValueError(
                "`images` must be uint8, or floats normalized with the `pixel_mean` "
                "and `pixel_std` of the model; these floats look like pixels. Pass "
                "pixels as uint8, `(255 * images).astype('uint8')` if they are in "
                "[0, 1]. Or create the model with `pixel_mean=None` if its encoder "
                "takes unnormalized images. Received: images of type "
                f"{images.dtype} from {low:.4g} to {high:.4g}"
            )


def is_float(images) -> bool:
    """Returns whether images are floats; raises for integers other than uint8."""
    name = keras.backend.standardize_dtype(images.dtype)
    if "float" not in name and name != "uint8":
        raise ValueError(
            "`images` must be uint8, or floats normalized with the `pixel_mean` and "
            "`pixel_std` of the model: pass pixels as `images.astype('uint8')`. "
            f"Received: images of type {name}"
        )
    return name != "uint8"


def _raise_for_rows(wrong, message):
    rows = np.flatnonzero(wrong)
    if rows.size:
        raise ValueError(
            f"{message} Received: {rows.size} such rows, starting with row {rows[0]}"
        )


def as_weights(weights):
    """Returns the sample weights of a step as `(batch,)` float32."""
    if len(weights.shape) != 1:
        raise ValueError(
            "`sample_weight` must have shape (batch,). "
            f"Received: sample_weight.shape={tuple(weights.shape)}"
        )
    return ops.cast(weights, "float32")


def check_unused(reason, **arguments):
    """Raises an error for arguments that would have no effect."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be None: {reason} "
                f"Received: {name} of type {type(value).__name__}"
            )


def as_dictionary(x, y=None, sample_weight=None, class_weight=None):
    """Merges arrays, or a batch, and their sample weights into one dictionary.

    Args:
        x: Data, or a tuple of data and the labels and sample weights after it, as in
            Keras. Of other data, only a `tf.data.Dataset` of tuples becomes one of
            dictionaries.
        y: Must be `None`.
        sample_weight: `(pairs,)` floats, for arrays only.
        class_weight: Must be `None`.
    """
    if isinstance(x, tuple | list) and x and isinstance(x[0], dict):
        if len(x) > 1 and isinstance(x[1], dict):
            # A list of batches, which `check_kind` refuses.
            return x
        x, own_y, own_weight = keras.utils.unpack_x_y_sample_weight(tuple(x))
        y = own_y if y is None else y
        sample_weight = own_weight if sample_weight is None else sample_weight
    check_unused(NO_LABELS, y=y, class_weight=class_weight)
    if sample_weight is not None:
        if not isinstance(x, dict) or "sample_weight" in x:
            raise ValueError(
                "`sample_weight` may be passed with arrays only: for other data, put "
                "the weights into the batches, under the key 'sample_weight'. "
                f"Received: sample_weight of type {type(sample_weight).__name__}, data "
                f"of type {type(x).__name__}"
            )
        x = {**x, "sample_weight": sample_weight}
    if is_tf_dataset(x) and not isinstance(x.element_spec, dict):
        return x.map(lambda *batch: as_dictionary(batch))
    if not isinstance(x, dict):
        return x
    arrays = {}
    for name, values in x.items():
        if isinstance(values, list | tuple):
            # Rows of different lengths make no array.
            with contextlib.suppress(ValueError):
                values = np.asarray(values)
        if values is not None:
            arrays[name] = values
    return arrays


def is_numeric(values):
    """Returns whether an array, a tensor or a spec holds numbers."""
    dtype = getattr(values, "dtype", "string")
    # Dtypes of TensorFlow and of a `Stream` have no `kind`, but equal their names.
    is_text = dtype in ("string", "object")
    return not is_text and getattr(dtype, "kind", None) not in (*"SUOMm",)
