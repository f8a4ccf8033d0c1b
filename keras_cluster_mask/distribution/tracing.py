"""Whether values can be read, or a step is only being compiled."""

import keras


def is_traced(value) -> bool:
    """Whether the value of a variable, tensor or array is only known in a later run."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return isinstance(getattr(value, "value", value), jax.core.Tracer)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.inside_function()
    import torch

    return torch.compiler.is_compiling()
