"""How benchmarks time: in turn, so that a machine whose speed drifts is fair to all."""

import statistics
import time

import keras


def interleaved(functions, rounds, repeats=1):
    """Times functions in turn, `rounds` times over, after one call to warm up.

    Args:
        functions: Dictionary of functions without arguments. Each must wait for its
            result, for instance by turning it into a number.
        rounds: How often each is timed.
        repeats: How many calls are timed together.

    Returns:
        Dictionary of lists: the seconds of one call in each round.
    """
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            seconds[name].append((time.perf_counter() - start) / repeats)
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
