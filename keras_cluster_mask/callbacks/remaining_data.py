import itertools

from keras import tree


class Remaining:
    """Training data, and what is left of it in the middle of an epoch.

    Args:
        data: What is passed to `fit`. If it has an attribute `position` (a
            `data.position.Position`), that finds the place; else steps are skipped.
        batch_size: Integer, of arrays.
        shuffle: Boolean, whether Keras shuffles arrays.
    """

    def __init__(self, data, batch_size, shuffle):
        self.data = data
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.position = getattr(data, "position", None)
        self.seed = getattr(self.position, "seed", None)
        self._samples = 0

    def check(self):
        """Raises if the place within an epoch would not be found again."""
        if self.position is not None or hasattr(self.data, "skip"):
            return
        if not isinstance(self.data, (dict, tuple, list)):
            raise ValueError(
                "`save_every` must be 'epoch' for data that cannot be asked for its "
                "later part: use an `image_text_dataset` or another `tf.data.Dataset` "
                f"to save in between. Received: data of type {type(self.data).__name__}"
            )
        if self.shuffle:
            raise ValueError(
                "`save_every` must be 'epoch' for arrays in a random order, which is "
                "not found again: pass `shuffle=False`, or a dataset. "
                "Received: arrays, shuffle=True"
            )

    def seek(self, epoch, step, samples):
        """Goes to a place; returns whether there is anything left of the epoch."""
        self._samples = samples
        self.start(epoch, step)
        rest = self.after(step)
        if isinstance(rest, (dict, tuple, list)):
            return len(tree.flatten(rest)[0]) > 0
        more = any(True for _ in itertools.islice(iter(rest), 1))
        self._samples = samples
        return more

    def start(self, epoch, step):
        """Called when an epoch starts, after `step` steps of it."""
        if self.position is not None:
            self.position.seek(epoch, self._samples if step else 0)

    def after(self, step):
        """The data of an epoch after `step` steps."""
        if not step or self.position is not None:
            return self.data
        if hasattr(self.data, "skip"):
            return self.data.skip(step)
        self.check()
        first = step * self.batch_size
        return tree.map_structure(lambda array: array[first:], self.data)

    def samples_after(self, batch):
        """How many samples of the epoch were read when a batch was full."""
        return 0 if self.position is None else self.position.reached(batch)

    def keys_of(self, batch):
        """The keys of the samples of a batch, if they are known."""
        return [] if self.position is None else self.position.keys(batch)
