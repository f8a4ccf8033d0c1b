"""Tells whether a value is symbolic because a step is being traced."""

import keras


def is_traced(value) -> bool:
    """Returns whether a variable, tensor or array is symbolic, as in a traced step."""
    if isinstance(value, keras.KerasTensor):
        return True
    value = getattr(value, "value", value)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return isinstance(value, jax.core.Tracer)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.inside_function()
    import torch

    if torch.compiler.is_compiling():
        return True
    if not isinstance(value, torch.Tensor):
        return False
    try:
        # In a transform of `torch.func` a tensor has no memory.
        value.data_ptr()
    except RuntimeError:
        return True
    return value.is_meta
