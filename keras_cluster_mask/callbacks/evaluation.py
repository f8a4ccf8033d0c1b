import collections.abc
import math
import zlib

import numpy as np
from keras import ops

from keras_cluster_mask.batches import read_batches
from keras_cluster_mask.callbacks.periodic import Periodic
from keras_cluster_mask.distribution.processes import all_gather_object


class Evaluation(Periodic):
    """Writes figures about data of its own into the logs of `fit`.

    A subclass has one method, `evaluate`.

    Args:
        data: What is evaluated, read anew each time.
        every: Integer, in epochs.
        name: String or `None`, between the prefix and the figure in the logs.
        prefix: String, the beginning of the names in the logs.
    """

    def __init__(self, data, every, name, prefix):
        super().__init__(every)
        if isinstance(data, collections.abc.Iterator):
            raise ValueError(
                "`data` must be what can be read again and again, such as arrays, an "
                "`ImageTextBatches`, a `tf.data.Dataset` or a `PyDataset`. "
                f"Received: an iterator of type {type(data).__name__}"
            )
        self.data = data
        self.name = name
        self.prefix = prefix
        self._embedder = None

    def evaluate(self, embedder, data):
        """The figures of some data as a dictionary of floats.

        Args:
            embedder: An `Embedder` of the model.
            data: What was given, or a list of some of its batches.
        """
        raise NotImplementedError

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        # Here, as it takes reading data, which the package does without.
        from keras_cluster_mask.evaluation.embedding import Embedder

        model = self.model
        if self._embedder is None or self._embedder.model is not model:
            self._embedder = Embedder(model)
        batches = read_batches(self.data)
        batch = next((each for each in batches if len(each["images"])), None)
        if batch is None:
            raise ValueError(
                f"`data` must hold at least one image. Received: data={self.data}"
            )
        _check_same_everywhere(batch["images"])
        # What is wrong with the data is found now rather than after an epoch.
        figures = self._named(self.evaluate(self._embedder, [batch]))
        # Keras hands one dictionary to all callbacks.
        known = {} if logs is None else logs
        taken = figures.keys() & known.keys()
        if taken:
            raise ValueError(
                "`name` must tell the figures of callbacks apart. Received: "
                f"name={self.name!r}, with which {sorted(taken)} are written twice"
            )
        self._figures = dict.fromkeys(figures, math.nan)
        known.update(self._figures)

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        if self.is_due(epoch):
            self._figures = self._evaluate(logs.get("loss", 0.0))
        logs.update(self._figures)

    def _evaluate(self, loss):
        # Another callback may be about to stop a training that has failed.
        if not math.isfinite(loss):
            return dict.fromkeys(self._figures, math.nan)
        _keep_to_itself(self.model.trainable_variables)
        figures = self._named(self.evaluate(self._embedder, self.data))
        # Devices round differently, and all processes must stop at the same epoch.
        of_main_process = all_gather_object(np.array([*figures.values()]))[0]
        return dict(zip(figures, map(float, of_main_process)))

    def _named(self, figures):
        start = f"{self.prefix}{self.name}_" if self.name else self.prefix
        return {f"{start}{figure}": value for figure, value in figures.items()}


class Retrieval(Evaluation):
    """Measures retrieval while a model trains: `kcm.evaluation.evaluate_retrieval`.

    Adds `val_image_to_text_recall@1` and so on to the logs at the end of an epoch, for
    the progress bar, the `History` that `fit` returns, and all callbacks that come
    after it in the list, so put it before `keras.callbacks.ModelCheckpoint`,
    `EarlyStopping`, `CSVLogger`, `TensorBoard` and `kcm.callbacks.Checkpoint`. Those
    that choose by a figure need to be told `mode="max"`.

    With `every=n` the epochs n, 2n and so on are evaluated, and the first and the last
    of a `fit`. In between the logs repeat the figures of the last evaluation, as each
    of Keras's callbacks takes something amiss with gaps: `ModelCheckpoint` would save
    a model it knows nothing of as the best one. A repeated figure is no improvement to
    any of them. Patience is counted in epochs: give `EarlyStopping` a multiple of n.

    Nothing is masked. What is evaluated are the weights that the model has when the
    epoch ends, as for Keras's own validation. With `use_ema=True` these are not the
    averages, which `fit` turns to when it ends; to evaluate these, put
    `keras.callbacks.SwapEMAWeights(swap_on_epoch=True)` before this callback. Training
    goes on, bit for bit, as without the callback. Before training the first batch is
    evaluated, so that errors show up in time; an epoch whose loss is not finite is
    not evaluated, its figures are NaN.

    With several processes each evaluates all of the data, and the figures are those of
    the main one; so give all of them the same callbacks and the same, whole data: on
    JAX an `ImageTextBatches(..., process=(0, 1))`.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    model.compile(optimizer="adam")
    batch = {
        "images": np.random.randint(0, 256, (12, 32, 32, 3)).astype("uint8"),
        "token_ids": np.random.randint(1, 100, (12, 16)).astype("int32"),
    }
    recall = "val_image_to_text_recall@1"
    callbacks = [
        kcm.callbacks.Retrieval(batch, every=2),
        keras.callbacks.ModelCheckpoint("best.keras", recall, save_best_only=True,
                                        mode="max"),
    ]
    history = model.fit(batch, batch_size=4, epochs=3, callbacks=callbacks)
    print(history.history[recall])
    ```

    Args:
        data: See `kcm.evaluation.embed`. Batches hold `"images"`, and `"token_ids"` or,
            for a `tokenizer`, `"captions"`. It is read anew in each evaluation.
        tokenizer: See `kcm.evaluation.embed`.
        every: Integer. How many epochs there are from one evaluation to the next.
        ks: See `kcm.evaluation.retrieval_recall`.
        duplicates: See `kcm.evaluation.evaluate_retrieval`.
        name: String. Tells several callbacks apart: `name="coco"` writes
            `val_coco_image_to_text_recall@1`.
        prefix: String. How the names in the logs begin. `"val_"` is what Keras's
            callbacks know validation by; use another for data that is trained on.

    Raises:
        ValueError: From `fit`, before it trains: for data without texts or images,
            data that differs between processes, callbacks that write the same figures,
            and another model than a `ContrastiveModel`.
    """

    def __init__(
        self,
        data,
        tokenizer=None,
        every=1,
        ks=(1, 5, 10),
        duplicates="negative",
        name=None,
        prefix="val_",
    ):
        super().__init__(data, every, name, prefix)
        self.tokenizer = tokenizer
        self.ks = ks
        self.duplicates = duplicates

    def evaluate(self, embedder, data):
        from keras_cluster_mask.evaluation import evaluate_retrieval

        return evaluate_retrieval(
            embedder, data, self.tokenizer, self.ks, self.duplicates, verbose=0
        )


class ZeroShot(Evaluation):
    """Measures zero-shot classification while a model trains.

    Adds `val_zero_shot_top_1` and the other figures of
    `kcm.evaluation.evaluate_zero_shot` to the logs. All that is said of
    `kcm.callbacks.Retrieval` holds: where to put it, epochs in between, which weights,
    several processes.

    Example:

    ```python
    names = ["cat", "dog", "fox"]
    tokenizer = kcm.data.CLIPTokenizer.train(names, 600)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    model.compile(optimizer="adam")
    images = np.random.randint(0, 256, (12, 32, 32, 3)).astype("uint8")
    labels = np.arange(12) % 3
    captions = [f"a photo of a {names[label]}.".encode() for label in labels]
    batch = {"images": images, "token_ids": tokenizer(captions)}
    callbacks = [kcm.callbacks.ZeroShot((images, labels), names, tokenizer)]
    history = model.fit(batch, batch_size=4, callbacks=callbacks)
    print(history.history["val_zero_shot_top_1"])
    ```

    Args:
        data: See `kcm.evaluation.embed`. Batches hold `"images"` and `"labels"`, the
            places of their classes in `class_names`. Read anew in each evaluation.
        class_names: List of str.
        tokenizer: See `kcm.evaluation.embed`.
        templates: See `kcm.evaluation.zero_shot_classifier`.
        every: Integer. How many epochs there are from one evaluation to the next.
        ks: See `kcm.evaluation.classification_accuracy`.
        name: String, or `None`. Tells several callbacks apart: `name="cifar10"` writes
            `val_cifar10_top_1`.
        prefix: String. How the names in the logs begin.

    Raises:
        ValueError: From `fit`, before it trains: for what
            `kcm.evaluation.evaluate_zero_shot` does not take, data that differs between
            processes, callbacks that write the same figures, and another model than a
            `ContrastiveModel`.
    """

    def __init__(
        self,
        data,
        class_names,
        tokenizer,
        templates=("a photo of a {}.",),
        every=1,
        ks=(1, 5),
        name="zero_shot",
        prefix="val_",
    ):
        super().__init__(data, every, name, prefix)
        self.class_names = class_names
        self.tokenizer = tokenizer
        self.templates = templates
        self.ks = ks

    def evaluate(self, embedder, data):
        from keras_cluster_mask.evaluation import evaluate_zero_shot

        return evaluate_zero_shot(
            embedder,
            data,
            self.class_names,
            self.tokenizer,
            self.templates,
            self.ks,
            verbose=0,
        )


def _keep_to_itself(variables):
    """Gives variables values that nothing else holds.

    On JAX the weights that something is predicted with are overwritten in place, and
    with them the averages that `SwapEMAWeights` has made the same arrays.
    """
    for variable in variables:
        variable.assign(ops.copy(variable))


def _check_same_everywhere(images):
    """Raises if processes have different data, whose figures would be of a part."""
    # Of 31 bits, as JAX's integers have no more.
    checksums = all_gather_object(zlib.crc32(np.ascontiguousarray(images)) >> 1)
    if len({*checksums}) > 1:
        raise ValueError(
            "`data` must be the same, and whole, in each process: for an "
            "`ImageTextBatches` or `image_text_dataset` pass `process=(0, 1)`. "
            f"Received: images with the checksums {checksums} by process"
        )
