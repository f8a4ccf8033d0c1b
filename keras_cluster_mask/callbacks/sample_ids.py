import collections

import numpy as np

KEY = "sample_id"
# More batches than any pipeline reads ahead.
REMEMBERED = 256


class SampleIds:
    """Which samples a batch held, of data that has an entry `"sample_id"`.

    Args:
        data: What is passed to `fit`: a dictionary of arrays or a `tf.data.Dataset` of
            dictionaries. Of other data nothing is known.
        options: Dictionary of arguments of `fit`, see `Remaining`.
    """

    def __init__(self, data, options):
        self._batch_size = options["batch_size"]
        self._steps_per_epoch = options["steps_per_epoch"]
        self._arrays = None
        if isinstance(data, dict) and not options["shuffle"]:
            self._arrays = data.get(KEY)
        self._start = 0, 0
        self._seen = collections.OrderedDict()

    def start(self, epoch, step):
        """Called before data is read from a place on."""
        self._start = epoch, step
        self._seen.clear()

    def remembered(self, data):
        """The same data, of which each batch is remembered when it is read."""
        spec = getattr(data, "element_spec", None)
        if not isinstance(spec, dict) or KEY not in spec:
            return data
        import tensorflow as tf

        def note(index, ids):
            self._seen[int(index)] = ids.tolist()
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            return np.False_

        def remember(index, batch):
            noted = tf.numpy_function(note, [index, batch[KEY]], "bool")
            with tf.control_dependencies([noted]):
                return {**batch, "images": tf.identity(batch["images"])}

        return data.enumerate().map(remember)

    def of(self, epoch, step):
        """The samples of a batch, as a list of str; empty if they are not known."""
        if self._arrays is not None:
            first = step * self._batch_size
            ids = np.asarray(self._arrays[first : first + self._batch_size]).tolist()
        else:
            ids = self._seen.get(self._index(epoch, step), [])
        return [x.decode() if isinstance(x, bytes) else str(x) for x in ids]

    def _index(self, epoch, step):
        """The number of a batch in the iterator that it came from."""
        first_epoch, first_step = self._start
        if self._steps_per_epoch is not None:
            # One iterator runs through all epochs.
            return (epoch - first_epoch) * self._steps_per_epoch + step - first_step
        return step - first_step if epoch == first_epoch else step
