import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_integer, check_range, sides_of
from keras_cluster_mask.distribution.backends import is_traced
from keras_cluster_mask.masking.patch_grid import (
    grid_of_square_patches,
    grid_shape,
)
from keras_cluster_mask.masking.selection import (
    add_state,
    best_patches,
    keep_patches,
    noise_of_call,
    noise_of_model,
    split_tokens,
)
from keras_cluster_mask.types import Tensor


class PatchMasking(keras.layers.Layer):
    """Base class of layers that leave out image patches while training.

    The layer sits in a vision transformer after the patch and position embedding and
    before the first block. In training, it keeps some of the patch tokens of every
    image. At inference, it returns its input unchanged.

    A strategy is a subclass with one method, `score`. The highest-scoring patches are
    kept; ties go to the patch with the larger noise. A strategy with the attribute
    `hides_tokens = True` can score a patch `-inf`, so that the patch has no effect. If
    such a patch is needed to reach the fixed number of tokens, a Keras mask hides it.
    One array of noise per step is the only randomness, so passing the same `noise`
    reproduces a mask.

    Example:

    ```python
    @keras.saving.register_keras_serializable()
    class CenterMasking(kcm.PatchMasking):
        "Keeps the patches in the middle of the sequence."

        def score(self, noise, images=None, tokens=None):
            position = keras.ops.arange(noise.shape[1], dtype="float32")
            return noise * 0.0 - keras.ops.abs(position - noise.shape[1] / 2)

    tokens = np.random.rand(2, 1 + 16, 8)
    masking = CenterMasking(mask_ratio=0.75, num_prefix_tokens=1)
    kept = masking(tokens, training=True)  # (2, 1 + 4, 8)
    ```

    Args:
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out. To
            train on whole images, set `masking.mask_ratio = 0.0` between two calls of
            `fit`: all patches are kept and nothing is scored.
        num_prefix_tokens: Integer. The number of tokens before the patch tokens (class
            token, registers), which are always kept. `None` infers it if the strategy
            knows the number of patches from the images. In an encoder of
            `kcm.with_masking`, `None` uses the encoder's number.
        seed: Integer. The random seed of the noise.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    On JAX, your own function under `jax.jit` cannot update the state of a Keras layer:
    use `masking.stateless_call`, which returns the new state.

    Call arguments:
        tokens: `(batch, prefix + N, dim)` tensor of embedded tokens, the patch
            tokens in row-major order of the image grid.
        images: The images of the tokens, for strategies that use pixels.
        training: Python boolean. Tokens are left out only if it is true.
        noise: `(batch, N)` float32 tensor in `[0, 1)`. Drawn if not given.

    Returns:
        `(batch, prefix + K, dim)` tensor of kept tokens in their original order and
        dtype. If some tokens are hidden, the output has a Keras mask.

    Reference:
        - [Scaling Language-Image Pre-training via Masking](
          https://arxiv.org/abs/2212.00794)
    """

    # True if a score of -inf hides a token that is kept as padding. Hiding needs an
    # attention mask; a strategy without such scores does not.
    hides_tokens = False

    # For strategies that leave out more of some images than of others: the minimum
    # fraction to leave out of each image. `mask_ratio` is then the average. If that is
    # 0, nothing is left out.
    min_mask_ratio: float | None = None

    # For strategies that use images: an integer or `(height, width)` in pixels.
    patch_size: int | tuple[int, int] | None = None
    data_format: str | None = None

    # Names of arguments of `__init__` that `get_config` returns as they are.
    _settings: tuple[str, ...] = ("mask_ratio", "num_prefix_tokens", "seed")

    # For strategies that depend on position: `(rows, columns)` of patches, if given.
    grid: tuple[int, int] | None = None

    def __init__(
        self,
        mask_ratio: float = 0.5,
        num_prefix_tokens: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        # Similarity is computed in float32 under any dtype policy, and tokens keep
        # their dtype, so inputs must not be cast.
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        check_range("mask_ratio", mask_ratio, 0, 1, "[)")
        self.mask_ratio = float(mask_ratio)
        self.num_prefix_tokens = check_integer(
            "num_prefix_tokens", num_prefix_tokens, 0, or_none=True
        )
        self.seed = check_integer("seed", seed, 0, or_none=True)
        # On torch, Keras adds the number of a draw to the seed, so neighboring seeds
        # would give the same masks, shifted by one step.
        hashed = np.random.SeedSequence(seed).generate_state(1)[0] >> 1
        self.seed_generator = keras.random.SeedGenerator(
            None if seed is None else int(hashed)
        )
        # A weight, because compiled steps can return values only through weights.
        self.last_mask_ratio = add_state(self, "last_mask_ratio", 0.0)
        self.supports_masking = True
        self.built = True
        self._is_ready = False
        # A model sets the function that it normalizes images with.
        self._prepare_pixels = None

    # === Methods that a strategy defines ===

    def score(
        self, noise: Tensor, images: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """Scores every patch; the highest-scoring patches are kept.

        Args:
            noise: `(batch, N)` float32 tensor in `[0, 1)`.
            images: Images, or `None` if the layer was called without images.
            tokens: `(batch, prefix + N, dim)` tensor, or `None`.

        Returns:
            `(batch, N)` float32 tensor. If the strategy has `hides_tokens`, a patch
            with `-inf` has no effect. NaN raises an error in the first call. Later, and
            in compiled steps, it makes the loss NaN.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `score(noise, images, tokens)`."
        )

    def num_kept(self, num_patches: int) -> int:
        """Returns how many of `num_patches` patches are kept, at least 1."""
        ratio = self.mask_ratio
        if self.min_mask_ratio is not None and ratio:
            ratio = self.min_mask_ratio
        # 1e-6 corrects products such as 10 * (1 - 0.9) = 0.99999...
        return max(1, int(num_patches * (1.0 - ratio) + 1e-6))

    def grid_shape(
        self, num_patches: int | None, images: Tensor | None = None
    ) -> tuple[int, int]:
        """Returns the rows and columns of patches, for strategies that use positions.

        Args:
            num_patches: Integer, N. Can be `None` if `grid` or `patch_size` is set.
            images: Images, or `None` if the layer was called without images.

        Returns:
            A tuple of two integers: `grid` or, if it was not given, the grid that the
            size of the images implies. Without images, the grid is square.
        """
        if self.grid is not None:
            return self.grid
        shape = None if images is None else images.shape
        if self.patch_size is None:
            return grid_of_square_patches(num_patches, shape, self.data_format)
        if shape is None:
            raise ValueError(
                f"`{self.name}` needs the images that the tokens were made from: "
                "call it as `masking(tokens, images=images)`. Received: images=None"
            )
        patch_size = sides_of("patch_size", self.patch_size)
        return grid_shape(shape, patch_size, self.data_format)

    # === Shared by all strategies ===

    def draw(self, batch_size: int, num_patches: int) -> Tensor:
        """Draws the noise of one step, the only source of randomness.

        Args:
            batch_size: Integer, the number of images in the global batch.
            num_patches: Integer, the number of patches per image.

        Returns:
            `(batch_size, num_patches)` float32 tensor, uniform in `[0, 1)`.
        """
        return keras.random.uniform(
            (batch_size, num_patches), dtype="float32", seed=self.seed_generator
        )

    def select(
        self,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Selects the patches to keep.

        Args:
            images: Images, for strategies that use pixels.
            tokens: `(batch, prefix + N, dim)` tensor, for use or to count patches.
            noise: `(batch, N)` float32 tensor in `[0, 1)`. Drawn if not given.

        Returns:
            A tuple `(indices, visible)`: `(batch, K)` int32 patch indices in ascending
            order, and `(batch, K)` booleans that are false for padding, which must have
            no effect.
        """
        if not any(map(is_traced, self.variables)):
            self.check_ready()
        images = None if images is None else ops.convert_to_tensor(images)
        tokens = None if tokens is None else ops.convert_to_tensor(tokens)
        knows_prefix = tokens is not None and self.num_prefix_tokens is not None
        if self.grid is not None or self.patch_size is not None:
            num_patches = math.prod(self.grid_shape(None, images))
        elif noise is None or knows_prefix:
            _, num_patches = split_tokens(self, tokens, images, self.num_prefix_tokens)
        else:
            num_patches = np.shape(noise)[-1]
        noise = noise_of_call(self, noise, images, tokens, num_patches)
        return best_patches(self, images, tokens, noise)[:2]

    def call(
        self,
        tokens: Tensor,
        images: Tensor | None = None,
        training: bool | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        tokens = ops.convert_to_tensor(tokens)
        if len(tokens.shape) != 3:
            raise ValueError(
                "`tokens` must have shape (batch, tokens, dim). "
                f"Received: tokens.shape={tuple(tokens.shape)}"
            )
        if not training and noise_of_model() is None:
            return tokens
        images = None if images is None else ops.convert_to_tensor(images)
        return keep_patches(self, tokens, images, noise)[0]

    # === Methods of a strategy with state, or that looks at the encoder ===

    def enter(self, encoder: keras.Model, embedding: keras.layers.Layer) -> None:
        """Connects the masking to an encoder. `MaskedEncoder` calls this method.

        Args:
            encoder: The encoder that contains the masking.
            embedding: The layer of the encoder that returns the tokens.
        """

    def check_ready(self) -> None:
        """Raises an error if the layer cannot train yet. Must be called eagerly."""
        # It may be changed between two calls of `fit`.
        check_range("mask_ratio", self.mask_ratio, 0, 1, "[)")

    def observe(self, score: Tensor) -> None:
        """Receives the scores in training, for strategies that keep state.

        Args:
            score: `(batch, N)` tensor that `score` returned.
        """

    def advance(self) -> None:
        """Advances state by one training step, for strategies that keep state."""

    # === Keras ===

    def compute_output_shape(
        self,
        tokens_shape: Sequence[int | None],
        images_shape: Sequence[int | None] | None = None,
    ) -> tuple[int | None, ...]:
        # The number of tokens depends on `training`.
        return (tokens_shape[0], None, tokens_shape[2])

    def compute_output_spec(
        self,
        tokens: Tensor,
        images: Tensor | None = None,
        training: bool | None = None,
        noise: Tensor | None = None,
    ) -> keras.KerasTensor:
        # Tokens keep their dtype under any policy.
        shape = self.compute_output_shape(tokens.shape)
        return keras.KerasTensor(shape, dtype=tokens.dtype)

    def save_own_variables(self, store: Any) -> None:
        # Keras's own method omits the state of the seed generator.
        for index, variable in enumerate(self.variables):
            store[str(index)] = variable

    def load_own_variables(self, store: Any) -> None:
        # Weights of a model without this masking have no state for it.
        if not store.keys():
            return
        for index, variable in enumerate(self.variables):
            variable.assign(store[str(index)])

    def settings(self) -> dict[str, Any]:
        """Returns the settings that a checkpoint must match, as a JSON dictionary."""
        others = "name", "trainable", "dtype"
        return {
            name: value
            for name, value in self.get_config().items()
            # Not of layers: their weights are compared, and Keras numbers their names.
            if name not in others
            and not (isinstance(value, dict) and "trainable" in value.get("config", ()))
        }

    def __repr__(self) -> str:
        return f"<{type(self).__name__} mask_ratio={self.mask_ratio:.3g}>"

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in self._settings},
        }


def join(masking, prepare_pixels):
    """Tells a masking how the model around it normalizes images.

    Args:
        masking: A `PatchMasking`.
        prepare_pixels: Function from the model's input images to the images that the
            masking sees.

    Raises:
        ValueError: If another model around the masking normalizes images differently.
    """
    if masking._prepare_pixels is not None:
        pixels = ops.convert_to_tensor(np.arange(27, dtype="uint8").reshape(1, 3, 3, 3))
        both = masking._prepare_pixels(pixels), prepare_pixels(pixels)
        if not np.array_equal(*map(ops.convert_to_numpy, both)):
            raise ValueError(
                f"`{masking.name}` is part of another model, which normalizes pixels "
                "differently: make a masking layer for each model. "
                f"Received: masking={masking.name}"
            )
    masking._prepare_pixels = prepare_pixels


def pixels_of(masking, images):
    """Returns images as a masking sees them in training."""
    images = ops.convert_to_tensor(images)
    prepare = masking._prepare_pixels
    return images if prepare is None else prepare(images)
