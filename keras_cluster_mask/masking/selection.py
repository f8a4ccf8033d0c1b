"""Selects the patches that are kept, by the noise of a step and a strategy's scores.

The noise of a step reaches the maskings by a context, because the layers between a
model and a masking forward only arguments that they know.
"""

import contextlib
import math
import threading

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import fits_shape
from keras_cluster_mask.distribution.backends import is_traced
from keras_cluster_mask.distribution.replicas import take_rows

# More tokens before the patches than any usual model has: a class token and registers.
MAX_PREFIX = 8
# Thread-local, because TensorFlow traces the step of each replica in its own thread.
_context = threading.local()


class StepNoise:
    """Draws the noise of a step, for some rows of the whole batch.

    A masking gets its rows of the noise of the whole batch, so a mask does not depend
    on the number of devices or micro-batches.

    Args:
        size: Integer, the number of images in the whole batch.
        take: Function from a `(size, ...)` tensor to the rows that are seen. `None`
            takes all.
    """

    def __init__(self, size, take=None):
        self.size = size
        self.take = take

    def draw(self, masking, num_patches):
        """Draws the noise of a masking, a `(rows, N)` tensor."""
        noise = masking.draw(self.size, num_patches)
        return noise if self.take is None else self.take(noise)

    @contextlib.contextmanager
    def given(self):
        """A context in which maskings mask with this noise."""
        before = noise_of_model()
        _context.noise = self
        try:
            yield
        finally:
            _context.noise = before


def noise_of_model():
    """Returns the `StepNoise` of the model that runs a step, or `None`."""
    return getattr(_context, "noise", None)


def split_tokens(masking, tokens, images, num_prefix: int | None) -> tuple[int, int]:
    """Returns how many tokens of an image are before the patches, and how many patches.

    Args:
        masking: A `PatchMasking`.
        tokens: `(batch, prefix + N, dim)` tensor, or `None`.
        images: The images of the tokens, or `None`.
        num_prefix: The number of tokens before the patches, if it is known.

    Raises:
        ValueError: If the number is not known and does not follow from the images, if
            it is too large to be likely, or if the tokens do not fit it.
    """
    num_tokens = None if tokens is None else tokens.shape[1]
    if masking.grid is not None or masking.patch_size is not None:
        num_patches = math.prod(masking.grid_shape(None, images))
        prefix = None if num_tokens is None else num_tokens - num_patches
        if prefix is None or prefix < 0 or num_prefix not in (None, prefix):
            raise ValueError(
                "`patch_size` (or `grid`) of a masking must match the model. `tokens` "
                "does not fit the image grid: expected "
                f"{'at least ' if num_prefix is None else ''}"
                f"{num_patches + (num_prefix or 0)} tokens ({num_patches} patches, "
                f"num_prefix_tokens={num_prefix}), found {num_tokens}. "
                f"Received: tokens.shape[1]={num_tokens}"
            )
        if num_prefix is None and prefix > MAX_PREFIX:
            raise ValueError(
                "`patch_size` (or `grid`) of a masking must match the model. If the "
                f"model has {prefix} tokens before its patches, pass "
                f"`num_prefix_tokens={prefix}`. Received: {num_tokens} tokens, and "
                f"{num_patches} patches of the masking {masking.name!r}"
            )
        return prefix, num_patches
    if num_prefix is None:
        raise ValueError(
            f"`{masking.name}` sees no image grid and cannot tell prefix tokens from "
            "patch tokens. Pass `num_prefix_tokens`, the number of tokens before the "
            "patches: 0, or 1 for a class token. "
            "Received: num_prefix_tokens=None"
        )
    if num_tokens is None or num_tokens <= num_prefix:
        raise ValueError(
            f"`tokens` of `{masking.name}` must have a known length greater than "
            f"num_prefix_tokens={num_prefix}. Received: tokens.shape[1]={num_tokens}"
        )
    return num_prefix, num_tokens - num_prefix


def anchor_count(num_patches, ratio):
    """Returns the fraction `ratio` of `num_patches`, rounded up, at least 1."""
    return max(1, num_patches - int(num_patches * (1.0 - ratio) + 1e-6))


def noise_of_call(masking, noise, images, tokens, num_patches):
    """Checks the noise of a call, or draws it.

    Args:
        masking: A `PatchMasking`.
        noise: `(batch, N)` tensor, a `StepNoise`, or `None`.
        images: Images, or `None`.
        tokens: `(batch, prefix + N, dim)` tensor, or `None`.
        num_patches: Integer, N.

    Returns:
        `(batch, N)` float32 tensor.
    """
    inputs = images if tokens is None else tokens
    if noise is inputs is None:
        raise ValueError(
            f"`{masking.name}` needs `images`, `tokens` or `noise`. Received: none"
        )
    if noise is None:
        noise = StepNoise(ops.shape(inputs)[0])
    if isinstance(noise, StepNoise):
        return noise.draw(masking, num_patches)
    noise = ops.convert_to_tensor(noise, dtype="float32")
    shape, batch_size = tuple(noise.shape), None if inputs is None else inputs.shape[0]
    if not fits_shape(shape, (batch_size, num_patches)):
        raise ValueError(
            f"`noise` must have shape ({batch_size or 'batch'}, {num_patches}), one "
            f"value a patch. Received: noise.shape={shape}"
        )
    return noise


def best_patches(masking, images, tokens, noise):
    """Returns the patches with the highest scores.

    Args:
        masking: A `PatchMasking`.
        images: Images, or `None`.
        tokens: `(batch, prefix + N, dim)` tensor, or `None`.
        noise: `(batch, N)` tensor.

    Returns:
        A tuple: `(batch, K)` int32 indices in ascending order, `(batch, K)` booleans
        that are false for hidden padding, and the `(batch, N)` scores. For a mask ratio
        of 0 there are no scores.
    """
    if not masking.mask_ratio:
        indices = _all_patches(noise, noise.shape[1])
        return indices, ops.ones_like(indices, dtype="bool"), None
    score = masking.score(noise, images, tokens)
    # A single row would be the score of all images.
    rows = {score.shape[0] if score.shape else 1, noise.shape[0]}
    if score.shape[1:] != noise.shape[1:] or (1 in rows and len(rows) > 1):
        raise ValueError(
            f"`score` of `{masking.name}` must return one value a patch, shape "
            f"{tuple(noise.shape)}. Received: shape {tuple(score.shape)}"
        )
    best = order_by_score(score, noise)[:, : masking.num_kept(noise.shape[1])]
    indices = ops.sort(best, axis=-1)
    if not masking.hides_tokens:
        return indices, ops.ones_like(indices, dtype="bool"), score
    visible = ops.take_along_axis(score, indices, axis=1) > -math.inf
    return indices, visible, score


def _all_patches(rows, num_patches):
    """Returns the `(batch, num_patches)` indices of all patches of `rows`."""
    indices = ops.arange(num_patches, dtype="int32")
    return ops.broadcast_to(indices, (ops.shape(rows)[0], num_patches))


def keep_patches(masking, tokens, images=None, noise=None, num_prefix=None):
    """Leaves out patch tokens, as a masking does in training.

    With a mask ratio of 0, it returns all tokens, and neither draws noise nor scores.

    Args:
        masking: A `PatchMasking`.
        tokens: `(batch, prefix + N, dim)` tensor.
        images: Images, for strategies that use pixels.
        noise: `(batch, N)` float32 tensor, or the `StepNoise` of a model. Drawn if not
            given.
        num_prefix: Integer, the number of tokens before the patch tokens. `None` uses
            the masking's number.

    Returns:
        The kept tokens, `(batch, prefix + K, dim)`, with a Keras mask if the strategy
        hides some of them; the `(batch, K)` indices of the kept patches.
    """
    noise = noise_of_model() if noise is None else noise
    given = masking.num_prefix_tokens if num_prefix is None else num_prefix
    num_prefix, num_patches = split_tokens(masking, tokens, images, given)
    if not masking.mask_ratio:
        masking.last_mask_ratio.assign(0.0)
        _end_call(masking)
        return tokens, _all_patches(tokens, num_patches)
    # Check only once, because reading a value makes an accelerator wait.
    is_first = not masking._is_ready and not any(map(is_traced, masking.variables))
    if is_first:
        masking.check_ready()
        masking._is_ready = True
    noise = noise_of_call(masking, noise, images, tokens, num_patches)
    indices, visible, score = best_patches(masking, images, tokens, noise)
    prefix = tokens[:, :num_prefix]
    kept = take_rows(tokens[:, num_prefix:], indices)
    share = ops.mean(ops.sum(ops.cast(visible, "float32"), axis=-1)) / num_patches
    masking.last_mask_ratio.assign(1.0 - share)
    masking.observe(score)
    _end_call(masking)
    kept = ops.concatenate([prefix, kept], axis=1)
    has_nan = ops.any(ops.isnan(score), axis=-1)[:, None, None]
    if is_first and not is_traced(has_nan) and ops.convert_to_numpy(has_nan).any():
        raise ValueError(
            f"`score` of `{masking.name}` must not return NaN. Received: a score of "
            f"shape {tuple(score.shape)} with NaN"
        )
    # A compiled step cannot raise an error on a value, but its loss is NaN then.
    kept = kept + ops.cast(ops.where(has_nan, np.nan, 0.0), kept.dtype)
    if masking.hides_tokens:
        always = ops.ones_like(prefix[:, :, 0], dtype="bool")
        kept = PutMask()(kept, mask=ops.concatenate([always, visible], axis=1))
    return kept, indices


def _end_call(masking):
    # A model that runs a step counts it. Otherwise each call is a step.
    if noise_of_model() is None:
        masking.advance()


def add_state(layer, name, value, dtype="float32"):
    """Adds a scalar weight to a layer, which is not trained.

    Args:
        layer: A Keras layer, such as a `PatchMasking`.
        name: String.
        value: Number, the initial value.
        dtype: String. Integers are equal on all replicas, and floats are averaged.
    """
    return layer.add_weight(
        shape=(),
        initializer=keras.initializers.Constant(value),
        trainable=False,
        dtype=dtype,
        autocast=False,
        aggregation="only_first_replica" if dtype == "int32" else "mean",
        name=name,
    )


class PutMask(keras.layers.Layer):
    """Attaches a Keras mask to tokens."""

    def __init__(self):
        super().__init__(name="put_mask")
        self.autocast = False
        self.supports_masking = True

    def call(self, tokens, mask):
        return tokens


def order_by_score(score, noise):
    """Returns patch indices from the highest score to the lowest.

    Args:
        score: `(batch, N)` float32 tensor.
        noise: `(batch, N)` float32 tensor. Among equal scores, the larger noise comes
            first.

    Returns:
        `(batch, N)` int32 tensor of indices.
    """
    # `argsort` is stable on all backends (`top_k` is not on torch), so sorting by noise
    # and then by score orders by both.
    by_noise = ops.argsort(-noise, axis=-1)
    by_score = ops.argsort(-ops.take_along_axis(score, by_noise, axis=1), axis=-1)
    return ops.cast(ops.take_along_axis(by_noise, by_score, axis=1), "int32")


def second_draw(noise):
    """Takes a second draw from the lower bits of the noise.

    Args:
        noise: `(batch, N)` float32 tensor in `[0, 1)`.

    Returns:
        `(batch, N)` float32 tensor in `[0, 1)`, independent of the first 12 bits of
        the noise.
    """
    # Exact, so equal on all backends, because 4096 is a power of two.
    return noise * 4096.0 % 1.0
