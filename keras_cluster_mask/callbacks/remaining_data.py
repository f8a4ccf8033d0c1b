import itertools

from keras import tree

from keras_cluster_mask.callbacks.sample_ids import SampleIds


class Remaining:
    """Training data, and what is left of it at some place.

    Args:
        data: What is passed to `fit`. If it has an attribute `position` (a
            `data.position.Position`), that finds the place; else steps are skipped.
        options: Dictionary of arguments of `fit`: `batch_size`, of arrays; `shuffle`,
            whether Keras shuffles arrays; `steps_per_epoch`, of data that goes on when
            an epoch ends, or `None`.
    """

    def __init__(self, data, options):
        self.data = data
        self.batch_size = options["batch_size"]
        self.shuffle = options["shuffle"]
        self.steps_per_epoch = options["steps_per_epoch"]
        self.position = getattr(data, "position", None)
        self.sample_ids = SampleIds(data, options)
        self._goes_on = False

    def describe(self):
        """What must be the same for a place to be found again, as a dictionary."""
        seed = getattr(self.position, "seed", None)
        batch_size = getattr(self.position, "batch_size", None)
        return {
            "data.seed": seed,
            "data.batch_size": batch_size,
            "data.steps_per_epoch": self.steps_per_epoch,
        }

    @property
    def pairs(self):
        """The number of pairs in an epoch, if it is known."""
        return getattr(self.position, "pairs", None)

    @pairs.setter
    def pairs(self, value):
        if self.position is not None and value is not None:
            self.position.pairs = value

    def check(self, within_epochs):
        """Raises if the place within an epoch, or at all, would not be found again."""
        if self.position is not None or hasattr(self.data, "skip"):
            return
        if self.steps_per_epoch is not None:
            raise ValueError(
                "`steps_per_epoch` needs data that is found again where an epoch ends: "
                "an `image_text_dataset` or another `tf.data.Dataset`. "
                f"Received: steps_per_epoch={self.steps_per_epoch}, data of type "
                f"{type(self.data).__name__}"
            )
        if not within_epochs:
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

    def is_over(self, epoch, step):
        """Whether nothing is left of an epoch after some steps of it."""
        if self.steps_per_epoch is not None:
            return step >= self.steps_per_epoch
        if isinstance(self.data, (dict, tuple, list)):
            pairs = self.data if isinstance(self.data, dict) else self.data[0]
            return step * self.batch_size >= len(pairs["token_ids"])
        steps = None if self.position is None else self.position.steps(epoch)
        if steps is not None:
            return step >= steps
        self.start(epoch, step)
        rest = self._after(epoch, step)
        return not any(True for _ in itertools.islice(iter(rest), 1))

    def after(self, epoch, step):
        """The data of an epoch after `step` steps, and of those that follow."""
        self._goes_on = False
        self.sample_ids.start(epoch, step)
        return self.sample_ids.remembered(self._after(epoch, step))

    def _after(self, epoch, step):
        if self.position is not None:
            return self.data
        if self.steps_per_epoch is not None:
            step += epoch * self.steps_per_epoch
            return self.data.repeat().skip(step) if step else self.data
        if not step:
            return self.data
        if hasattr(self.data, "skip"):
            return self.data.skip(step)
        self.check(within_epochs=True)
        first = step * self.batch_size
        if isinstance(self.data, dict):
            # Of which some may be lists, as those of names are.
            return {key: array[first:] for key, array in self.data.items()}
        return tree.map_structure(lambda array: array[first:], self.data)

    def start(self, epoch, step):
        """Called when an epoch starts, after `step` steps of it."""
        if self.position is None or self._goes_on:
            return
        if self.steps_per_epoch is not None:
            # Keras reads on where the last epoch ended.
            self._goes_on = True
            epoch, step = self.position.after(epoch * self.steps_per_epoch + step)
        self.position.seek(epoch, step)

    def keys_of(self, epoch, step):
        """The keys of the samples of a batch, if they are known."""
        if self.position is None:
            return self.sample_ids.of(epoch, step)
        if self.steps_per_epoch is not None:
            epoch, step = self.position.after(epoch * self.steps_per_epoch + step)
        return self.position.keys(epoch, step)
