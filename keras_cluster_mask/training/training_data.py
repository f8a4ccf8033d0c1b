"""Data of any kind, as Keras reads it: checked, and in training from any step on.

| Data | Checked | Padding is cut off | Starts at |
| --- | --- | --- | --- |
| arrays, `TowerFeatures` | once, as a whole | by `_read` | any batch |
| `image_text_dataset` | batch by batch | by `_read` | any batch |
| `tf.data.Dataset` | its first batch | by `prepared` | any batch |
| all else that Keras takes | its first batch | on torch | any pass |

The first two are streams. On torch, which compiles no steps, the texts of all kinds of
data are cut before a step, see `cut_texts`. Several processes of JAX cut nothing off.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import types
import warnings
import zlib

import keras

from keras_cluster_mask.batches import is_endless, is_tf_dataset
from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.backends import compiles_steps, fixes_shapes
from keras_cluster_mask.distribution.processes import all_gather_object
from keras_cluster_mask.distribution.replicas import process_index_and_count
from keras_cluster_mask.distribution.tensorflow_data import dataset_of, prepared
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.training.arrays import ArrayBatches
from keras_cluster_mask.training.features import FeatureBatches, TowerFeatures
from keras_cluster_mask.training.input_rules import KEYS, as_dictionary
from keras_cluster_mask.training.model_tokenizer import check_data_tokenizer

# Packages with classes of data that Keras takes.
TAKEN = {"grain", "keras", "tensorflow", "torch"}


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
        stream: The `Stream` that the data is from. For other data an empty one.
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
            data = dataclasses.replace(rules, chunk_size=1).check_arrays(data)
            data = ArrayBatches(data, batch_size, shuffle)
        elif isinstance(data, TowerFeatures):
            data = FeatureBatches(data, batch_size, shuffle)
        self.shuffle = shuffle and not isinstance(data, ArrayBatches)
        self.type_name = type(data).__name__
        self.stream = stream = data if isinstance(data, Stream) else Stream()
        if not stream.training:
            raise ValueError(
                "`x` must be a dataset for training: make it with `training=True`. "
                f"Received: x={data}, which was made with training=False"
            )
        self.steps_per_epoch = steps or stream.steps_per_epoch
        if self.steps_per_epoch is None and is_endless(data):
            raise ValueError(
                "`steps_per_epoch` must be given for a `tf.data.Dataset` that never "
                "ends. Received: steps_per_epoch=None"
            )
        self._checked = checked(data, rules)
        self._is_dataset = is_tf_dataset(data)
        self.spec = data.element_spec if self._is_dataset else stream.element_spec
        self.origin = first_epoch, stream.start, stream.shuffle_seed
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
        return {**self.stream.description, "steps_per_epoch": self.steps_per_epoch}

    def _check_same(self):
        """Raises an error unless all processes have the same data."""
        found = {**self.description, "rows": self.rows}
        content = json.dumps(found, sort_keys=True).encode()
        # 31 bits, since JAX's integers have no more.
        if len({*all_gather_object(zlib.crc32(content) >> 1)}) > 1:
            raise ValueError(
                "`x` must be the same data, in the same order and in batches of the "
                "same size, in all processes: check that all processes see the same "
                f"shards, and pass the same `seed`. Received here: {found}"
            )

    def start_at(self, epoch):
        """Makes the next pass over a stream start at an epoch.

        Returns:
            The data for Keras, from that epoch on.
        """
        first_epoch, first_batch, seed = self.origin
        step = (epoch - first_epoch) * (self.steps_per_epoch or 0)
        self.stream.start, self.stream.shuffle_seed = first_batch + step, seed
        is_later = step and self._is_dataset
        return self._checked.skip(step) if is_later else self._checked


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
            "Data for evaluation and prediction must be finite: pass `training=False` "
            "to `image_text_dataset`, or pass `steps`. Received: an endless "
            f"{type(data).__name__}"
        )
    check_data_tokenizer(model, data)
    _, processes = process_index_and_count(training=False)
    if isinstance(data, dict | TowerFeatures) and processes > 1:
        raise ValueError(
            "Arrays cannot be evaluated or predicted by several JAX processes, because "
            "each process would read all rows as its part of a batch: pass an "
            "`image_text_dataset`, or a `tf.data.Dataset` of the rows of this process. "
            f"Received: {type(data).__name__}, {processes} processes"
        )
    if isinstance(data, TowerFeatures):
        data.check_model(model)
        return data.pairs(slice(None))
    if isinstance(data, dict):
        # For validation, Keras passes arrays that `fit` has made of features.
        if "image_features" in data:
            return data
        rules = rules_of(model)
        return rules.cut(rules.check_arrays(data))
    return checked(data, rules_of(model))


def rules_of(model):
    """Returns the `InputRules` of a model, which cut padding off if steps do not.

    Processes of JAX compile one step for the batch of all, so that their texts must
    have equal lengths. They cut nothing off.
    """
    _, readers = process_index_and_count(training=False)
    _, trainers = process_index_and_count(training=True)
    # Steps need it, too. An unknown encoder should not be tested within one.
    lengths = model.text_tower.lengths
    return dataclasses.replace(
        model.input_rules,
        lengths=lengths if readers == 1 and compiles_steps() else None,
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
    """Returns data for Keras, after a check of its first batch, or with one of each.

    Args:
        data: A `Stream`, or the user's data other than arrays.
        rules: The `InputRules` for its batches.
    """
    if isinstance(data, Stream):
        return _checked_stream(data, rules)
    if is_tf_dataset(data):
        return _checked_dataset(data, rules)
    is_generator = isinstance(data, types.GeneratorType)
    packages = {x.__module__.partition(".")[0] for x in type(data).__mro__}
    if not is_generator and packages.isdisjoint(TAKEN):
        raise ValueError(
            "`x` and `validation_data` must be a dictionary of arrays, an "
            "`image_text_dataset`, a `tf.data.Dataset`, a grain dataset, a "
            "`PyDataset`, a torch `DataLoader`, or a generator of batches. For other "
            "iterables of batches, such as a list, pass `(batch for batch in data)` "
            "for one epoch, or a `PyDataset` for several. For image files, pass an "
            f"`image_text_dataset`. Received: data of type {type(data)}"
        )
    # The iterator of a `PyDataset` never ends, and that of others starts again.
    is_sequence = isinstance(data, keras.utils.PyDataset)
    batches = map(data.__getitem__, [0]) if is_sequence else iter(data)
    first = [*itertools.islice(batches, 1)]
    for batch in first:
        rules.check(batch)
    if not is_generator:
        return data
    # Keras reads only generators, and no other iterators, and only tuples from them.
    batches = itertools.chain(first, data)
    return (x if isinstance(x, tuple) else (x,) for x in batches)


def _checked_stream(stream, rules):
    specs = stream.element_spec
    is_checked = isinstance(stream, ArrayBatches)
    if not is_checked:
        # The captions and keys of an `image_text_dataset` are for evaluation.
        specs = rules.check_keys(specs, warns=False)
        rules.check_images(specs["images"])
    cut = () if rules.lengths is None else {*rules.lengths.names} & specs.keys()
    free = {
        name: keras.InputSpec(specs[name].dtype, (specs[name].shape[0], None))
        for name in cut
    }

    def read():
        with contextlib.closing(iter(stream)) as batches:
            for batch in batches:
                batch = {name: batch[name] for name in specs}
                if not is_checked:
                    rules.check_values(batch)
                yield rules.cut(batch)

    if fixes_shapes():
        return dataset_of(read, {**specs, **free})
    return ((batch,) for batch in read())


def _checked_dataset(data, rules):
    specs = rules.check_keys(data.element_spec)
    rules.check_images(specs["images"])
    names = sorted({*KEYS, "sample_weight", "padding_mask"} & specs.keys())
    data = data.map(lambda batch: {name: batch[name] for name in specs})
    return prepared(data, names, rules.check_values, rules.cut)
