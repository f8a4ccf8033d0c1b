"""The kinds of data that Keras reads, with a check of each batch added.

`checked` is the only function that depends on the kind of data. The check of a batch
also cuts off the padding after its longest text. Two kinds of data keep their padding:
a `PyDataset` or a `DataLoader` on TensorFlow, and all data of several processes of JAX.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import sys
import types

import keras
import numpy as np

from keras_cluster_mask.batches import as_array
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.training.input_rules import KEYS


def checked(data, rules):
    """Returns data for Keras, with a check of each batch added.

    Args:
        data: A `Stream`, or the user's data other than arrays.
        rules: The `InputRules` for its batches.
    """
    if isinstance(data, Stream):
        # The captions and keys of an `image_text_dataset` are for evaluation.
        rules.warns[...] = False
    specs = getattr(data, "element_spec", None)
    if specs is not None and not rules.is_checked:
        specs = rules.check_keys(specs)
        rules.check_images(specs["images"])
    on_tensorflow = keras.backend.backend() == "tensorflow"
    if isinstance(data, Stream):
        read = functools.partial(_read, data, rules)
        return _tensorflow_dataset(read, specs, rules) if on_tensorflow else read()
    if specs is not None:
        return _checked_dataset(data, rules)
    if _is_of(data, "grain", "MapDataset", "IterDataset"):
        return _of_any_lengths(data.map(rules.check), rules)
    if isinstance(data, types.GeneratorType):
        # Keras reads only generators, and no other iterators.
        return _of_any_lengths((rules.check(batch) for batch in data), rules)
    if on_tensorflow:
        # Keras would refuse a length that neither of the first two batches has.
        rules = dataclasses.replace(rules, lengths=None)
    if isinstance(data, keras.utils.PyDataset):
        return _CheckedBatches(data, rules.check)
    if _is_of(data, "torch.utils.data", "DataLoader"):
        return _checked_loader(data, rules)
    raise ValueError(
        "`x` and `validation_data` must be a dictionary of arrays, an "
        "`image_text_dataset`, a `tf.data.Dataset`, a grain `MapDataset` or "
        "`IterDataset`, a `PyDataset`, a `DataLoader` of torch, or a generator of "
        "batches. Of other batches, such as a list or a `grain.DataLoader`, pass "
        "`(batch for batch in data)` for one epoch, and a `PyDataset` for several. Of "
        "image files, make an `image_text_dataset`. "
        f"Received: data of type {type(data)}"
    )


def _is_of(data, module, *names):
    """Returns whether data is of a class of a package, which may not be imported."""
    module = sys.modules.get(module)
    return module is not None and isinstance(
        data, tuple(getattr(module, name) for name in names)
    )


def _read(stream, rules):
    with contextlib.closing(iter(stream)) as batches:
        for batch in batches:
            yield rules.check(batch)


def _of_any_lengths(batches, rules):
    """Returns checked batches as data that Keras reads with texts of any lengths."""
    if rules.lengths is None or keras.backend.backend() != "tensorflow":
        return batches
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        return batches
    if iterator is batches:
        batches = itertools.chain([first], iterator)
    specs = {
        name: keras.InputSpec(str(as_array(x).dtype), (None, *np.shape(x)[1:]))
        for name, x in first[0].items()
    }
    return _tensorflow_dataset(lambda: batches, specs, rules)


def _tensorflow_dataset(read, specs, rules):
    """Returns checked batches as a `tf.data.Dataset`, with texts of any lengths.

    Of other data, Keras on TensorFlow fixes the shapes of batches by the first two.
    """
    from keras_cluster_mask.distribution.tensorflow_data import dataset_of

    lengths = rules.lengths
    free = () if lengths is None else {*lengths.names} & specs.keys()
    texts = {
        name: keras.InputSpec(specs[name].dtype, (specs[name].shape[0], None))
        for name in free
    }
    return dataset_of(lambda: (batch for (batch,) in read()), {**specs, **texts})


def _checked_dataset(data, rules):
    import tensorflow as tf

    cut = () if rules.lengths is None else rules.lengths.names

    def check(batch):
        def check_arrays(*arrays):
            arrays = dict(zip(names, arrays))
            rules.check_values(arrays)
            if cut:
                arrays = rules.lengths.cut(arrays)
            return np.int32(arrays["token_ids"].shape[1])

        batch = rules.check_keys(batch)
        # Images that are not floats are checked by their type alone, since copies take
        # time.
        names = {*KEYS, "sample_weight", "padding_mask", *cut} & batch.keys()
        if not batch["images"].dtype.is_floating:
            names.remove("images")
        names = sorted(names)
        values = [batch[name] for name in names]
        length = tf.numpy_function(check_arrays, values, "int32")
        length.set_shape(())
        with tf.control_dependencies([length]):
            batch["token_ids"] = tf.identity(batch["token_ids"])
        return batch | {name: batch[name][:, :length] for name in {*cut} & {*names}}

    return data.map(check)


class _CheckedBatches(keras.utils.PyDataset):
    def __init__(self, data, check):
        super().__init__(
            workers=data.workers,
            use_multiprocessing=data.use_multiprocessing,
            max_queue_size=data.max_queue_size,
        )
        self.data, self.check = data, check

    @property
    def num_batches(self):
        return self.data.num_batches

    def __getitem__(self, index):
        return self.check(self.data[index])

    def on_epoch_begin(self):
        self.data.on_epoch_begin()

    def on_epoch_end(self):
        self.data.on_epoch_end()


def _checked_loader(data, rules):
    import torch

    # Shared, or each worker process would warn in each epoch.
    rules.warns = torch.tensor(bool(rules.warns)).share_memory_()
    # The copy leaves the user's own unchanged.
    loader = copy.copy(data)
    loader.collate_fn = functools.partial(_collate, rules, loader.collate_fn)
    return loader


def _collate(rules, collate, samples):
    return rules.check(collate(samples))
