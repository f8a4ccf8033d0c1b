import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_integer, check_range, sides_of
from keras_cluster_mask.distribution.backends import is_traced
from keras_cluster_mask.distribution.replicas import (
    local_rows,
    num_replicas,
    take_rows,
)
from keras_cluster_mask.masking.patch_grid import (
    grid_of_square_patches,
    grid_shape,
)
from keras_cluster_mask.masking.selection import (
    PutMask,
    add_state,
    order_by_score,
    rest_count,
)
from keras_cluster_mask.types import Tensor

# More tokens before the patches than any usual model has: a class token and registers.
MAX_PREFIX = 8


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
        noise: `(batch, N)` float32 tensor in `[0, 1)`. If it is not given, it is drawn,
            and the call counts as a training step of the masking.
        num_prefix_tokens: Integer. The number of tokens before the patch tokens.
            Defaults to the masking's own number.

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
            with `-inf` has no effect. A score with NaN makes all tokens of the image
            NaN, and so the loss.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `score(noise, images, tokens)`."
        )

    def num_kept(self, num_patches: int) -> int:
        """Returns how many of `num_patches` patches are kept, at least 1."""
        return max(1, rest_count(num_patches, self.mask_ratio))

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
        if not is_traced(self.last_mask_ratio):
            self.check_ready()
        images, tokens = (
            None if x is None else ops.convert_to_tensor(x) for x in (images, tokens)
        )
        given = images if tokens is None else tokens
        if noise is None and given is None:
            raise ValueError(
                f"`{self.name}` needs `images`, `tokens` or `noise`. Received: none"
            )
        has_grid = self.grid is not None or self.patch_size is not None
        knows_prefix = tokens is not None and self.num_prefix_tokens is not None
        if noise is None or has_grid or knows_prefix:
            num_tokens = None if tokens is None else tokens.shape[1]
            num_patches = self.count_patches(num_tokens, images)
        else:
            num_patches = np.shape(noise)[-1]
        noise = self._noise_of(noise, given, num_patches)
        return self._best(noise, images, tokens)[:2]

    def call(
        self,
        tokens: Tensor,
        images: Tensor | None = None,
        training: bool | None = None,
        noise: Tensor | None = None,
        num_prefix_tokens: int | None = None,
    ) -> Tensor:
        tokens = ops.convert_to_tensor(tokens)
        if len(tokens.shape) != 3:
            raise ValueError(
                "`tokens` must have shape (batch, tokens, dim). "
                f"Received: tokens.shape={tuple(tokens.shape)}"
            )
        if not training:
            return tokens
        images = None if images is None else ops.convert_to_tensor(images)
        return self.keep(tokens, images, noise, num_prefix_tokens)[0]

    def keep(
        self,
        tokens: Tensor,
        images: Tensor | None = None,
        noise: Tensor | None = None,
        num_prefix_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Leaves out patch tokens, as a call in training does.

        With a mask ratio of 0, it returns all tokens, and neither draws nor scores.

        Args:
            tokens: `(batch, prefix + N, dim)` tensor.
            images: Images, for strategies that use pixels.
            noise: `(batch, N)` float32 tensor in `[0, 1)`. Drawn if not given.
            num_prefix_tokens: Integer. Defaults to the masking's own number.

        Returns:
            A tuple: the kept tokens, `(batch, prefix + K, dim)`, and the `(batch, K)`
            int32 indices of the kept patches.
        """
        num_patches = self.count_patches(tokens.shape[1], images, num_prefix_tokens)
        is_step = noise is None
        if is_step and not is_traced(self.last_mask_ratio):
            self.check_ready()
        if self.mask_ratio:
            noise = self._noise_of(noise, tokens, num_patches)
            indices, visible, score = self._best(noise, images, tokens)
            share = ops.mean(ops.sum(ops.cast(visible, "float32"), axis=-1))
            self.last_mask_ratio.assign(1.0 - share / num_patches)
            self.observe(score)
            num_prefix = tokens.shape[1] - num_patches
            prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
            tokens = ops.concatenate([prefix, take_rows(patches, indices)], axis=1)
            # A compiled step cannot raise an error on a value, but its loss is NaN.
            has_nan = ops.any(ops.isnan(score), axis=-1)[:, None, None]
            tokens = tokens + ops.cast(ops.where(has_nan, np.nan, 0.0), tokens.dtype)
            if self.hides_tokens:
                always = ops.ones_like(prefix[:, :, 0], dtype="bool")
                mask = ops.concatenate([always, visible], axis=1)
                tokens = PutMask()(tokens, mask=mask)
        else:
            self.last_mask_ratio.assign(0.0)
            indices = _all_patches(tokens, num_patches)
        if is_step:
            self.advance()
        return tokens, indices

    def count_patches(
        self,
        num_tokens: int | None,
        images: Tensor | None = None,
        num_prefix_tokens: int | None = None,
    ) -> int:
        """Returns how many of the tokens of an image are patches: the last ones.

        Args:
            num_tokens: Integer, the number of tokens of an image. `None` if there are
                only images.
            images: The images of the tokens, for strategies that use pixels.
            num_prefix_tokens: Integer. Defaults to the masking's own number.

        Raises:
            ValueError: If the number of tokens before the patches is not known and does
                not follow from the images, or if the tokens do not fit it.
        """
        prefix = num_prefix_tokens
        prefix = self.num_prefix_tokens if prefix is None else prefix
        if self.grid is None and self.patch_size is None:
            if None in (prefix, num_tokens) or num_tokens <= prefix:
                raise ValueError(
                    f"`num_prefix_tokens` of `{self.name}` must be the number of "
                    "tokens before the patches: 0, or 1 for a class token. Received: "
                    f"num_prefix_tokens={prefix}, {num_tokens} tokens"
                )
            return num_tokens - prefix
        num_patches = math.prod(self.grid_shape(None, images))
        if num_tokens is not None:
            found = num_tokens - num_patches
            fits = 0 <= found <= MAX_PREFIX if prefix is None else found == prefix
            if not fits:
                raise ValueError(
                    f"`patch_size` (or `grid`) and `num_prefix_tokens` of `{self.name}`"
                    f" must match the model. Received: {num_tokens} tokens, of which "
                    f"{num_patches} are patches, and num_prefix_tokens={prefix}"
                )
        return num_patches

    def _noise_of(self, noise, inputs, num_patches):
        """Returns the noise of a call, drawn if it is not given."""
        if noise is None:
            # The rows of this replica, so that replicas leave out different patches.
            return local_rows(
                self.draw(ops.shape(inputs)[0] * num_replicas(), num_patches)
            )
        noise = ops.convert_to_tensor(noise, dtype="float32")
        shape, batch_size = noise.shape, None if inputs is None else inputs.shape[0]
        fits = len(shape) == 2 and shape[1] == num_patches
        if not fits or (None not in (shape[0], batch_size) and shape[0] != batch_size):
            raise ValueError(
                "`noise` must have one value per patch: shape "
                f"({batch_size or 'batch'}, {num_patches}). Received: "
                f"noise.shape={tuple(shape)}"
            )
        return noise

    def _best(self, noise, images, tokens):
        """Returns indices and visibility of the kept patches, and all scores."""
        if not self.mask_ratio:
            indices = _all_patches(noise, noise.shape[1])
            return indices, ops.ones_like(indices, dtype="bool"), None
        score = self.score(noise, images, tokens)
        # A single row would be the score of all images.
        rows = {score.shape[0] if score.shape else 1, noise.shape[0]}
        if score.shape[1:] != noise.shape[1:] or (1 in rows and len(rows) > 1):
            raise ValueError(
                f"`score` of `{self.name}` must return one value per patch, shape "
                f"{tuple(noise.shape)}. Received: shape {tuple(score.shape)}"
            )
        best = order_by_score(score, noise)[:, : self.num_kept(noise.shape[1])]
        indices = ops.sort(best, axis=-1)
        if not self.hides_tokens:
            return indices, ops.ones_like(indices, dtype="bool"), score
        visible = ops.take_along_axis(score, indices, axis=1) > -math.inf
        return indices, visible, score

    # === Methods of a strategy with state ===

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
        """Advances state by one training step, for strategies that keep state.

        A call without `noise` does it. A model that passes the noise of a step does it
        once a step.
        """

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
        num_prefix_tokens: int | None = None,
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


def _all_patches(rows, num_patches):
    """Returns the `(batch, num_patches)` indices of all patches of `rows`."""
    indices = ops.arange(num_patches, dtype="int32")
    return ops.broadcast_to(indices, (ops.shape(rows)[0], num_patches))
