"""Keeps the weights of a model whose first step of training fails."""

import keras


class FirstStep:
    """The values of a model's variables before the first step of a `fit`.

    On JAX, Keras takes the values out of the variables while it trains, and puts back
    those of the last step. If the first one fails, there are none, and the variables
    would start from new random values.

    Args:
        model: A compiled and built `keras.Model`.
    """

    def __init__(self, model: keras.Model):
        self._values = []
        if keras.backend.backend() == "jax":
            variables = *model.variables, *model.metrics_variables
            self._values = [
                (variable, variable.value)
                for variable in (*variables, *model.optimizer.variables)
            ]

    def undo(self) -> None:
        """Puts the values back."""
        for variable, value in self._values:
            # A step that began to run may have used the memory of its inputs.
            if not value.is_deleted():
                variable.assign(value)
