"""Data of any kind, as Keras reads it: checked, and in training from any step on.

Arrays, `TowerFeatures` and an `image_text_dataset` are streams: the batch size is
known, and reading starts at any batch. `data_kinds.py` says how Keras reads streams and
all else. Of this, a `tf.data.Dataset` starts at any batch, too, and other data at any
epoch if each epoch is one pass over the data.
"""

import contextlib
import dataclasses
import json
import warnings
import zlib

import keras

from keras_cluster_mask.batches import is_endless
from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.processes import (
    all_gather_object,
    process_index_and_count,
)
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.training.arrays import ArrayBatches
from keras_cluster_mask.training.data_kinds import checked
from keras_cluster_mask.training.features import FeatureBatches, TowerFeatures
from keras_cluster_mask.training.input_rules import as_dictionary
from keras_cluster_mask.training.tokens import check_tokenizer_of


class TrainingData:
    """Training data that can be read from any step on, as a resumed run does.

    Args:
        data: The user's data, from `as_dictionary`.
        rules: The `InputRules` of the model.
        batch_size: Integer, the batch size of arrays.
        shuffle: Boolean, whether to shuffle arrays, or the batches of a `PyDataset`.
            `None` shuffles.
        steps_per_epoch: Integer, for data that continues across epochs, or `None`.
            Defaults to that of a stream. If it is `None`, each epoch is a pass.
        first_epoch: Integer, the first epoch to train.

    Attributes:
        origin: A tuple: the first epoch; the number of batches of the stream before its
            first step, since a stream continues where the last `fit` on it ended; and,
            for arrays, the seed of their order, otherwise `None`.
        spec: Dictionary with the shape and dtype of each entry of a batch; `None` if
            they are not known before a batch is read.
        stream: The endless stream that the data is from, or `None`.
        shuffle: Boolean. Whether Keras must shuffle the data. It warns if it cannot.
        rows: Integer, the number of pairs that this process reads per step, or `None`.
        batch_size: Integer, the number of pairs per step on all devices, or `None`.
        description: Dictionary. The settings that must be the same when a run is
            resumed.
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
        is_sequence = isinstance(data, keras.utils.PyDataset)
        self.shuffle = is_sequence if shuffle is None else shuffle
        if isinstance(data, dict | TowerFeatures):
            self.shuffle, is_shuffled = False, shuffle is None or shuffle
            if isinstance(data, dict):
                # Arrays are checked once, as a whole.
                data = rules.check_keys(data)
                rules.check_values(data)
                data = ArrayBatches(data, batch_size, is_shuffled)
            else:
                data = FeatureBatches(data, batch_size, is_shuffled)
                rules.lengths = None
            rules.is_checked = True
        self._type = type(data)
        self.spec = getattr(data, "element_spec", None)
        self.stream = data if is_endless(data) else None
        if isinstance(data, Stream) and not data.training:
            raise ValueError(
                "`x` must be a dataset for training: make it with `training=True`. "
                f"Received: x={data}, which was made with training=False"
            )
        self._checked = checked(data, rules)
        self.origin = (
            first_epoch,
            getattr(self.stream, "start", 0),
            getattr(self.stream, "shuffle_seed", None),
        )
        self.steps_per_epoch = steps or getattr(self.stream, "steps_per_epoch", None)
        self.description = {
            **getattr(self.stream, "description", {}),
            "data.steps_per_epoch": self.steps_per_epoch,
        }
        _, processes = process_index_and_count(training=True)
        # Batches of features have labels in place of ids.
        spec = self.spec or {}
        texts = spec.get("token_ids", spec.get("caption_labels"))
        self.rows = None if texts is None else texts.shape[0]
        self.batch_size = None if self.rows is None else self.rows * processes
        found = {**self.description, "data.rows": self.rows}
        content = json.dumps(found, sort_keys=True).encode()
        # 31 bits, since JAX's integers have no more.
        if processes > 1 and len({*all_gather_object(zlib.crc32(content) >> 1)}) > 1:
            raise ValueError(
                "`x` must be the same data, in the same order and in batches of the "
                "same size, in all processes: check that all see the same shards, and "
                f"pass the same `seed`. Received here: {found}"
            )

    def check_resumable(self):
        """Raises an error if the data cannot be read from the start of an epoch."""
        if self.steps_per_epoch is not None and self.spec is None:
            raise ValueError(
                "`steps_per_epoch` needs data that can be read from the end of an "
                "epoch on: an `image_text_dataset` or another `tf.data.Dataset`. "
                f"Received: steps_per_epoch={self.steps_per_epoch}, data of type "
                f"{self._type.__name__}"
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
            self.check_resumable()
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
    _, processes = process_index_and_count(training=False)
    lengths = model.text_tower.lengths if processes == 1 else None
    return dataclasses.replace(model.input_rules, lengths=lengths)


@contextlib.contextmanager
def until_the_end():
    """Suppresses Keras's warning at the end of data of unknown length."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Your input ran out of data", UserWarning)
        yield
