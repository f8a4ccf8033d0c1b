"""Timing of functions in turn, so that drift of the machine affects all equally."""

import gc
import statistics
import time

import keras


def interleaved(functions, rounds, repeats=1, clock=time.perf_counter):
    """Times functions in turn, `rounds` times over, after one call to warm up.

    Args:
        functions: Dictionary of functions without arguments. Each must wait for its
            result, for instance by turning it into a number.
        rounds: How often each is timed.
        repeats: How many calls are timed together.
        clock: Function that returns seconds.

    Returns:
        Dictionary of lists: the seconds of one call in each round.
    """
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            for _ in range(repeats):
                function()
            seconds[name].append((clock() - start) / repeats)
    return seconds


def ratio(seconds, name, to):
    """The median, over rounds, of one function's time in parts of another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to]))


def compiled(function):
    """Compiles a function of tensors the way the running backend's models do."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function  # Keras runs torch eagerly.


def fits(function):
    """Calls a function; returns whether there was enough memory for it."""
    error, message = _out_of_memory()
    try:
        function()
    except error as found:
        if message not in str(found):
            raise
        return False
    return True


def release_memory():
    """Gives back what objects that are no longer in use have left."""
    gc.collect()
    if keras.backend.backend() == "torch":
        import torch

        torch.cuda.empty_cache()


def _out_of_memory():
    """The error of the running backend without memory, and a part of its message."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.OutOfMemoryError, ""
    if keras.backend.backend() == "jax":
        import jax

        return jax.errors.JaxRuntimeError, "RESOURCE_EXHAUSTED"
    import tensorflow as tf

    return tf.errors.ResourceExhaustedError, ""
