"""Matrix products in the precision of their dtype."""

import contextlib
import functools

import keras


def in_full_precision(function):
    """Decorates a function to compute float32 matrix products in full precision.

    By default JAX computes them in bfloat16 on TPUs and in TF32 on GPUs. That is too
    imprecise for similarities that are scaled by up to 100, or that decide which of two
    patches is kept. The gradients of the products use the same precision. torch uses
    full precision by default. TensorFlow has a single setting for the whole program,
    which is left to the user:
    `tf.config.experimental.enable_tensor_float_32_execution(False)` for GPUs.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with _full_precision():
            return function(*args, **kwargs)

    return wrapped


def _full_precision():
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")
