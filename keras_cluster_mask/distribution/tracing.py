"""Whether values can be read, or a step is only being compiled."""

import keras


def is_traced(variable: keras.Variable) -> bool:
    """Whether the value of a variable is only known once a compiled step runs."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return isinstance(variable.value, jax.core.Tracer)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.inside_function()
    import torch

    return torch.compiler.is_compiling()
