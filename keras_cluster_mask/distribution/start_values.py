"""Keeps the weights of a model whose training or evaluation fails."""

import contextlib
from collections.abc import Iterator

import keras


class StartValues:
    """The values of a model's variables before Keras takes them out.

    On JAX, Keras takes the values out of the variables while it trains or evaluates.
    Where the first step fails, it does not put them back, and the variables would start
    from new random values.

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
        """Gives the variables their values."""
        for variable, value in self._values:
            # A step that began to run may have used the memory of its inputs.
            if not value.is_deleted():
                variable.assign(value)


@contextlib.contextmanager
def keeping_weights(model: keras.Model) -> Iterator[None]:
    """A context in which a model is evaluated, and keeps its weights if that fails.

    Keras's `fit` puts back the values of the last step that ended, and needs
    `StartValues` for its first step alone; its `evaluate` and `predict` put back none.
    """
    start = StartValues(model)
    try:
        yield
    except BaseException:
        if keras.backend.backend() == "jax":
            model.jax_state_sync()
        start.put_back()
        raise
