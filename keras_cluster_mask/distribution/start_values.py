"""Restores the weights of a model if its training or evaluation fails."""

import contextlib
from collections.abc import Iterator

import keras


class StartValues:
    """The values of a model's variables before Keras removes them.

    On JAX, Keras removes the values of variables while it trains or evaluates. If the
    first step fails, it does not restore them, and the variables would get new random
    values.

    Args:
        model: A built `keras.Model`.
    """

    def __init__(self, model: keras.Model):
        self._values = []
        if keras.backend.backend() == "jax":
            variables = [*model.variables, *model.metrics_variables]
            if (optimizer := getattr(model, "optimizer", None)) is not None:
                variables += optimizer.variables
            self._values = [(variable, variable.value) for variable in variables]

    def put_back(self) -> None:
        """Restores the values of the variables."""
        for variable, value in self._values:
            # A step that started to run may have reused the memory of its inputs.
            if not value.is_deleted():
                variable.assign(value)


@contextlib.contextmanager
def keeping_weights(model: keras.Model) -> Iterator[None]:
    """A context in which a model keeps its weights if its evaluation fails.

    Keras's `fit` restores the values of the last step that ended, and needs
    `StartValues` only for its first step. Its `evaluate` and `predict` restore none.
    """
    start = StartValues(model)
    try:
        yield
    except BaseException:
        if keras.backend.backend() == "jax":
            model.jax_state_sync()
        start.put_back()
        raise
