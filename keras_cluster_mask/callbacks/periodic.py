from typing import Any

import keras

from keras_cluster_mask.checks import check_integer


def model_of(callback, attribute):
    """The model of a callback, after a check that it has what a `ContrastiveModel` has.

    To be asked for once: each access makes JAX copy the weights back to the model.
    """
    model = callback.model
    if getattr(model, attribute, None) is None:
        raise ValueError(
            f"`{type(callback).__name__}` works with the `fit` of a "
            f"`ContrastiveModel`. Received: a {type(model).__name__}"
        )
    return model


class Periodic(keras.callbacks.Callback):
    """Does something at the end of each so many epochs of a `ContrastiveModel`.

    The first and the last epoch of a `fit` are always among them.

    Args:
        every: Integer, in epochs.
    """

    def __init__(self, every: int):
        super().__init__()
        self.every = check_integer("every", every)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        model_of(self, "encode_image")
        self._is_first = True

    def is_due(self, epoch: int) -> bool:
        """Whether this epoch, which has just ended, is one of them."""
        is_last = epoch + 1 == self.params["epochs"] or self.model.stop_training
        is_first, self._is_first = self._is_first, False
        return is_first or is_last or (epoch + 1) % self.every == 0
