"""Data of any kind, as Keras reads it: checked, and in training from any step on.

Arrays, `TowerFeatures` and an `image_text_dataset` are streams: the batch size is
known, and reading starts at any batch. Of all else, a `tf.data.Dataset` starts at any
batch, too, and other data at any epoch if each epoch is one pass over the data.

`checked` is the only function that depends on the kind of data. The check of a batch
also cuts off the padding after its longest text. Two kinds of data keep their padding:
a `PyDataset` or a `DataLoader` on TensorFlow, and all data of several processes of JAX.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import sys
import types
import warnings
import zlib

import keras
import numpy as np

from keras_cluster_mask.batches import as_array, is_endless
from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.processes import all_gather_object
from keras_cluster_mask.distribution.replicas import process_index_and_count
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.training.arrays import ArrayBatches
from keras_cluster_mask.training.features import FeatureBatches, TowerFeatures
from keras_cluster_mask.training.input_rules import KEYS, as_dictionary
from keras_cluster_mask.training.tokenizers import check_tokenizer_of


class TrainingData:
    """Training data that can be read from any step on, as a resumed run does.

    Args:
        data: The user's data, from `as_dictionary`.
        rules: The `InputRules` of the model.
        batch_size: Integer, the batch size of arrays.
        shuffle: Boolean, whether to shuffle arrays, or the batches of a `PyDataset`.
            `None` shuffles.
        steps_per_epoch: Integer, for data that continues across epochs, or `None`.
            Defaults to the value of a stream. If it is `None`, each epoch is a pass.
        first_epoch: Integer, the first epoch to train.

    Attributes:
        origin: A tuple: the first epoch; the number of batches of the stream before its
            first step, since a stream continues where the last `fit` on it ended; and,
            for arrays, the seed of their order, otherwise `None`.
        type_name: String, the name of the class of the data.
        spec: Dictionary with the shape and dtype of each entry of a batch; `None` if
            they are not known before a batch is read.
        stream: The endless stream that the data is from, or `None`.
        shuffle: Boolean. Whether Keras must shuffle the data. It warns if it cannot.
        rows: Integer, the number of pairs that this process reads per step, or `None`.
        batch_size: Integer, the number of pairs per step on all devices, or `None`.
    """

    def __init__(
        self,
        data,
        rules,
        batch_size=None,
        shuffle=None,
        steps_per_epoch=None,
        first_epoch=0,
    ):
        first_epoch = check_integer("initial_epoch", first_epoch, 0)
        steps = check_integer("steps_per_epoch", steps_per_epoch, or_none=True)
        rules = dataclasses.replace(rules, training=True)
        if shuffle is None:
            shuffle = isinstance(data, dict | TowerFeatures | keras.utils.PyDataset)
        if isinstance(data, dict):
            # Arrays are checked once, as a whole.
            data = rules.check_keys(data)
            dataclasses.replace(rules, chunk_size=1).check_values(data)
            data = ArrayBatches(data, batch_size, shuffle)
        elif isinstance(data, TowerFeatures):
            data = FeatureBatches(data, batch_size, shuffle)
            rules.lengths = None
        self.shuffle = shuffle and not isinstance(data, ArrayBatches)
        self.type_name = type(data).__name__
        self.spec = getattr(data, "element_spec", None)
        self.stream = data if isinstance(data, Stream) else None
        if self.stream is not None and not data.training:
            raise ValueError(
                "`x` must be a dataset for training: make it with `training=True`. "
                f"Received: x={data}, which was made with training=False"
            )
        if steps is None and self.stream is None and is_endless(data):
            raise ValueError(
                "`steps_per_epoch` must be given for a `tf.data.Dataset` that never "
                "ends. Received: steps_per_epoch=None"
            )
        self._checked = checked(data, rules)
        start, seed = (getattr(self.stream, x, None) for x in ("start", "shuffle_seed"))
        self.origin = first_epoch, start or 0, seed
        self.steps_per_epoch = steps or getattr(self.stream, "steps_per_epoch", None)
        _, processes = process_index_and_count(training=True)
        # Batches of features have labels in place of ids.
        spec = self.spec or {}
        texts = spec.get("token_ids", spec.get("caption_labels"))
        self.rows = None if texts is None else texts.shape[0]
        self.batch_size = None if self.rows is None else self.rows * processes
        if processes > 1:
            self._check_same()

    @property
    def description(self):
        """Dictionary. The settings that must be the same when a run is resumed."""
        # An index is read for it.
        found = getattr(self.stream, "description", {})
        return {**found, "steps_per_epoch": self.steps_per_epoch}

    def _check_same(self):
        """Raises an error unless all processes have the same data."""
        found = {**self.description, "rows": self.rows}
        content = json.dumps(found, sort_keys=True).encode()
        # 31 bits, since JAX's integers have no more.
        if len({*all_gather_object(zlib.crc32(content) >> 1)}) > 1:
            raise ValueError(
                "`x` must be the same data, in the same order and in batches of the "
                "same size, in all processes: check that all see the same shards, and "
                f"pass the same `seed`. Received here: {found}"
            )

    def start_at(self, epoch):
        """Makes the next pass over a stream start at an epoch.

        Returns:
            The data for Keras, from that epoch on.
        """
        first_epoch, first_batch, seed = self.origin
        step = (epoch - first_epoch) * (self.steps_per_epoch or 0)
        if self.stream is not None:
            self.stream.start = first_batch + step
            if seed is not None:
                self.stream.shuffle_seed = seed
        elif step:
            return self._checked.skip(step)
        return self._checked


def evaluation_data(model, x, y=None, sample_weight=None, steps=None):
    """Returns data for evaluation or prediction, for Keras.

    Args:
        model: A `ContrastiveModel`.
        x: The user's data.
        y: Must be `None`.
        sample_weight: `(pairs,)` floats, for arrays only.
        steps: Integer, the number of batches to read, or `None` for all.
    """
    data = as_dictionary(x, y, sample_weight)
    if steps is None and is_endless(data):
        raise ValueError(
            "Data that is evaluated or predicted must end: pass `training=False` to "
            "`image_text_dataset`, or `steps`. "
            f"Received: an endless {type(data).__name__}"
        )
    check_tokenizer_of(model, data)
    _, processes = process_index_and_count(training=False)
    if isinstance(data, dict | TowerFeatures) and processes > 1:
        raise ValueError(
            "Arrays cannot be evaluated or predicted by several processes of JAX, "
            "which would each read all rows as their part of a batch: pass an "
            "`image_text_dataset`, or a `tf.data.Dataset` of the rows of this process. "
            f"Received: {type(data).__name__}, {processes} processes"
        )
    if isinstance(data, TowerFeatures):
        data.check_model(model)
        return data.pairs(slice(None))
    if isinstance(data, dict):
        # For validation, Keras passes arrays that `fit` has made of features.
        return data if "image_features" in data else rules_of(model).check(data)[0]
    return checked(data, rules_of(model))


def rules_of(model):
    """Returns the `InputRules` of a model, which cut padding off the texts.

    Processes of JAX compile one step for the batch of all, so that their texts must
    have equal lengths. They cut nothing off.
    """
    _, readers = process_index_and_count(training=False)
    _, trainers = process_index_and_count(training=True)
    return dataclasses.replace(
        model.input_rules,
        lengths=model.text_tower.lengths if readers == 1 else None,
        # Rounded up: a micro-batch that processes cannot share is refused later.
        chunk_size=math.ceil((model.micro_batch_size or 1) / trainers),
    )


@contextlib.contextmanager
def until_the_end():
    """Suppresses Keras's warning at the end of data of unknown length."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Your input ran out of data", UserWarning)
        yield


# === The kinds of data ===


def checked(data, rules):
    """Returns data for Keras, with a check of each batch added.

    Args:
        data: A `Stream`, or the user's data other than arrays.
        rules: The `InputRules` for its batches.
    """
    specs = getattr(data, "element_spec", None)
    if isinstance(data, Stream):
        # The captions and keys of an `image_text_dataset` are for evaluation.
        rules.warns[...] = False
    if specs is not None and not isinstance(data, ArrayBatches):
        specs = rules.check_keys(specs)
        rules.check_images(specs["images"])
    on_tensorflow = keras.backend.backend() == "tensorflow"
    if isinstance(data, Stream):
        read = functools.partial(_read, data, specs, rules)
        return _tensorflow_dataset(read, specs, rules) if on_tensorflow else read()
    if specs is not None:
        return _checked_dataset(data, specs, rules)
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


def _read(stream, names, rules):
    with contextlib.closing(iter(stream)) as batches:
        for batch in batches:
            batch = {name: batch[name] for name in names}
            if not isinstance(stream, ArrayBatches):
                rules.check_values(batch)
            yield (rules.cut(batch),)


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


def _checked_dataset(data, specs, rules):
    import tensorflow as tf

    cut = () if rules.lengths is None else rules.lengths.names
    names = {*KEYS, "sample_weight", "padding_mask", *cut} & specs.keys()
    # Images that are not floats are checked only by their type, since copies take time.
    if not specs["images"].dtype.is_floating:
        names.remove("images")
    names = sorted(names)

    def check_arrays(*arrays):
        arrays = dict(zip(names, arrays))
        rules.check_values(arrays)
        return np.int32(rules.cut(arrays)["token_ids"].shape[1])

    def check(batch):
        batch = {name: batch[name] for name in specs}
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
