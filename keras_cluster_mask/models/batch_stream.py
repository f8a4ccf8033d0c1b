"""Batches that are made in Python, such as `ImageTextBatches`, as Keras reads data."""

# Keras takes adapters of one's own, but does not export their base class. Its
# `PyDataset` must know the number of its batches, which varies between epochs.
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.data_adapters.data_adapter import DataAdapter


class BatchStream(DataAdapter):
    """An epoch of batches each time that it is iterated over, of a length not known.

    Args:
        batches: An iterable of dictionaries of NumPy arrays, with an `element_spec`.
        check: Function that raises an error for a batch no model can take.
    """

    def __init__(self, batches, check):
        self._batches = batches
        self._check = check
        self.element_spec = {
            name: spec
            for name, spec in batches.element_spec.items()
            if spec.dtype != "string"
        }

    def __iter__(self):
        for batch in self._batches:
            self._check(batch)
            yield {name: batch[name] for name in self.element_spec}

    def get_numpy_iterator(self):
        return iter(self)

    def get_jax_iterator(self):
        return iter(self)

    def get_torch_dataloader(self):
        return data_adapter_utils.get_torch_dataloader(self)

    @property
    def num_batches(self):
        return None

    @property
    def batch_size(self):
        return None
