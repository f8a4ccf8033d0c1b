"""Products of matrices in the precision of their dtype."""

import contextlib
import functools

import keras


def in_full_precision(function):
    """Decorates a function whose products of float32 matrices must be float32's.

    By default JAX multiplies them in bfloat16 on TPUs and in TF32 on GPUs. Similarities
    that are scaled by up to 100, or that decide which of two patches stays, need more.
    The gradients of the products are computed in the same precision. torch's default is
    full precision. TensorFlow has one setting for a whole program, which is the user's:
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
