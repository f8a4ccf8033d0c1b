"""What batches must be like for a model: checked on the host, before it sees them."""

import dataclasses

import numpy as np

from keras_cluster_mask.batches import as_array

LONELY = (
    "A contrastive loss compares the pairs of a batch, so it needs at least two pairs."
)
# How often the brightest normalised pixel: images that were resized after they had been
# normalised may exceed it, and pixels up to 255 exceed even this.
MARGIN = 3.0


@dataclasses.dataclass(frozen=True)
class InputRules:
    """What images, token ids and weights a model can use.

    Attributes:
        vocabulary_size: Integer, the number of token ids, or `None` if it is not known.
        end_token_id: Integer, the id that every text must hold, or `None`.
        max_pixel: Float, the value of the brightest normalised pixel; `None` for a
            model that takes images as they are.
    """

    vocabulary_size: int | None = None
    end_token_id: int | None = None
    max_pixel: float | None = None

    def check(self, batch, training=False):
        """Raises an error for a batch that the model could not use.

        Args:
            batch: Dictionary of arrays. Images may be missing if they are uint8.
            training: Boolean. Whether it is trained on.
        """
        self.check_ids(batch["token_ids"])
        if "images" in batch:
            self.check_images(batch["images"])
        rows = len(batch["token_ids"])
        if "sample_weight" in batch:
            check_weights(batch["sample_weight"], rows)
        if training and rows < 2:
            raise ValueError(f"{LONELY} Received: a batch of {rows}")

    def check_ids(self, ids):
        """Raises an error for `(batch, T)` token ids that a text encoder lacks."""
        ids = as_array(ids)
        low, high = (ids.min(), ids.max()) if ids.size else (0, 0)
        size = self.vocabulary_size
        if size is not None and (low < 0 or high >= size):
            raise ValueError(
                f"`token_ids` must be in the text encoder's vocabulary, [0, {size}). "
                "Were they made by another tokenizer? "
                f"Received: ids from {low} to {high}"
            )
        if self.end_token_id is None:
            return
        endless = np.flatnonzero(~np.any(ids == self.end_token_id, axis=-1))
        if endless.size:
            raise ValueError(
                "Each row of `token_ids` must hold the end-of-text token, "
                f"{self.end_token_id}: the text encoder returns its features there. "
                "Truncate texts before the token is added. Received: "
                f"{endless.size} rows without it, the first of them row {endless[0]}"
            )

    def check_images(self, images):
        """Raises an error for `(batch, ...)` images that were not normalised."""
        if self.max_pixel is None or not self.check_type(images):
            return
        images = as_array(images)
        if not images.size:
            return
        low, high = float(images.min()), float(images.max())
        # No constant batch, and none with NaN, which compares as false.
        is_within = 0 <= low < high
        if not (is_within and (high <= 1 or high > MARGIN * self.max_pixel)):
            return
        raise ValueError(
            "`images` must be uint8, or floats normalised with the `pixel_mean` and "
            "`pixel_std` of the model; these floats look like pixels. Pass pixels as "
            "uint8, `(255 * images).astype('uint8')` if they are in [0, 1]; or make "
            "the model with `pixel_mean=None` if its encoder takes images as they are. "
            f"Received: images of type {images.dtype} from {low:.4g} to {high:.4g}"
        )

    def check_type(self, images) -> bool:
        """Raises an error for integers other than uint8; says if images are floats."""
        # A word, as NumPy, Keras and TensorFlow have types of their own.
        name = str(getattr(images.dtype, "name", images.dtype)).split(".")[-1]
        if "float" in name:
            return True
        if self.max_pixel is not None and name != "uint8":
            raise ValueError(
                "`images` must be uint8, or floats normalised with the `pixel_mean` "
                "and `pixel_std` of the model: pass pixels as "
                f"`images.astype('uint8')`. Received: images of type {name}"
            )
        return False


def check_weights(weights, pairs: int):
    """Raises an error for weights of rows that could not be used."""
    weights = as_array(weights)
    if weights.shape != (pairs,) or not np.all(np.isfinite(weights) & (weights >= 0)):
        raise ValueError(
            f"`sample_weight` must hold {pairs} finite numbers of at least 0, one a "
            f"pair. Received: sample_weight={weights}"
        )
