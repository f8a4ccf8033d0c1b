import keras


class Periodic(keras.callbacks.Callback):
    """Does something at the end of each so many epochs of a `ContrastiveModel`.

    The first and the last epoch of a `fit` are always among them.

    Args:
        every: Integer, in epochs.
    """

    def __init__(self, every):
        super().__init__()
        if not (isinstance(every, int) and every > 0):
            raise ValueError(
                f"`every` must be a positive integer. Received: every={every!r}"
            )
        self.every = every

    def on_train_begin(self, logs=None):
        model = self.model
        if not hasattr(model, "encode_image"):
            raise ValueError(
                f"`{type(self).__name__}` works with the `fit` of a "
                f"`ContrastiveModel`. Received: a {type(model).__name__}"
            )
        self._is_first = True

    def is_due(self, epoch):
        """Whether this epoch, which has just ended, is one of them."""
        is_last = epoch + 1 == self.params["epochs"] or self.model.stop_training
        is_first, self._is_first = self._is_first, False
        return is_first or is_last or (epoch + 1) % self.every == 0
