import collections.abc
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.batches import read_batches
from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.backends import copy_values
from keras_cluster_mask.distribution.processes import all_gather_object
from keras_cluster_mask.training.training_run import RunCallback
from keras_cluster_mask.types import Templates


class Evaluation(RunCallback):
    """Evaluates data every few epochs, and adds the metrics to the logs of `fit`.

    The first and the last epoch of a `fit` are always evaluated.

    Args:
        data: The data to evaluate, read again each time.
        every: Integer, the number of epochs between evaluations.
        name: String or `None`, between `val_` and the metric's name in the logs.
        function: String, the name of a function in `kcm.evaluation`.
        **options: Arguments of this function.
    """

    def __init__(
        self, data: Any, every: int, name: str | None, function: str, **options: Any
    ):
        super().__init__()
        self.every = check_integer("every", every)
        if isinstance(data, collections.abc.Iterator):
            raise ValueError(
                "`data` must be readable more than once: arrays, a dataset, or a "
                "`tf.data.Dataset` or a `PyDataset`. "
                f"Received: an iterator of type {type(data).__name__}"
            )
        # Imported here: evaluation needs packages that `import keras` does not.
        from keras_cluster_mask.evaluation.checks import check_whole

        check_whole("data", data)
        self.data = data
        self.name = name
        self.function, self.options = function, options
        self._embedder = None

    def evaluate(self, embedder: Any, data: Any) -> dict[str, float]:
        """Returns the metrics of some data as a dictionary of floats.

        Args:
            embedder: An `Embedder` of the model.
            data: The callback's data, or a list of some of its batches.
        """
        from keras_cluster_mask import evaluation

        function = getattr(evaluation, self.function)
        return function(embedder, data, **self.options, verbose=0)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        from keras_cluster_mask.evaluation.embedding import Embedder

        super().on_train_begin(logs)
        self._is_first = True
        # Once: on JAX, each access to `model` copies the weights back to the model.
        model = self.model
        if self._embedder is None or self._embedder.model is not model:
            self._embedder = Embedder(model)
        batches = read_batches(self.data)
        batch = next((each for each in batches if len(each["images"])), None)
        if batch is None:
            raise ValueError(
                f"`data` must hold at least one image. Received: data={self.data}"
            )
        # Evaluate one batch now, to find errors in the data before the first epoch.
        metrics = self._named(self.evaluate(self._embedder, [batch]))
        # Keras passes one dictionary to all callbacks.
        known = {} if logs is None else logs
        taken = metrics.keys() & known.keys()
        if taken:
            raise ValueError(
                "`name` must distinguish the metrics of callbacks. Received: "
                f"name={self.name!r}, with which {sorted(taken)} are written twice"
            )
        self._metrics = dict.fromkeys(metrics, math.nan)
        known.update(self._metrics)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        is_last = epoch + 1 == self.params["epochs"] or self.model.stop_training
        is_first, self._is_first = self._is_first, False
        if is_first or is_last or (epoch + 1) % self.every == 0:
            self._metrics = self._evaluate(logs.get("loss", 0.0))
        logs.update(self._metrics)

    def _evaluate(self, loss):
        # Training has failed, and another callback may be about to stop it.
        if not math.isfinite(loss):
            return dict.fromkeys(self._metrics, math.nan)
        copy_values(self.model.trainable_variables)
        metrics = self._named(self.evaluate(self._embedder, self.data))
        # Use the metrics of the main process: devices round differently, and all
        # processes must stop at the same epoch.
        of_main_process = all_gather_object(np.array([*metrics.values()]))[0]
        return dict(zip(metrics, map(float, of_main_process)))

    def _named(self, metrics):
        # Keras's callbacks recognize metrics of validation by `val_`.
        start = f"val_{self.name}_" if self.name else "val_"
        return {f"{start}{name}": value for name, value in metrics.items()}


class Retrieval(Evaluation):
    """Computes retrieval metrics during `fit`, by `kcm.evaluation.evaluate_retrieval`.

    Adds `val_image_to_text_recall@1` and the other metrics to the logs at the end of an
    epoch: for the progress bar, for the `History` that `fit` returns, and for all
    callbacks after it in the list. Put it before `keras.callbacks.ModelCheckpoint`,
    `EarlyStopping`, `CSVLogger`, `TensorBoard` and `kcm.callbacks.Checkpoint`, and pass
    `mode="max"` to those that monitor a recall.

    With `every=n`, the epochs n, 2n and so on are evaluated, and also the first and the
    last epoch of a `fit`. In other epochs the logs repeat the last metrics, since
    Keras's callbacks do not support missing ones: `ModelCheckpoint` would save an epoch
    without metrics as the best one. A repeated metric does not count as an improvement.
    Patience is counted in epochs: give `EarlyStopping` a multiple of n.

    Masking is off. The weights are those at the end of the epoch, as in Keras's own
    validation. With `use_ema=True` these are not the averages, which `fit` assigns when
    it ends; to evaluate the averages, put
    `keras.callbacks.SwapEMAWeights(swap_on_epoch=True)` before this callback. Training
    is bit for bit the same as without the callback. The first batch is evaluated before
    training, to find errors early. An epoch whose loss is not finite is not evaluated;
    its metrics are NaN.

    With several processes, each evaluates all data, and the logs get the metrics of the
    main process. Give all of them the same callbacks and the same, complete data: on
    JAX an `image_text_dataset(..., process=(0, 1))`.

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
            with a `tokenizer`, `"captions"`. Read again in each evaluation.
        tokenizer: See `kcm.evaluation.embed`.
        every: Integer. The number of epochs between evaluations.
        ks: See `kcm.evaluation.retrieval_recall`.
        duplicates: See `kcm.evaluation.evaluate_retrieval`.
        name: String. Distinguishes several callbacks: `name="coco"` writes
            `val_coco_image_to_text_recall@1`.

    Raises:
        ValueError: For an iterator, and for an `image_text_dataset` with
            `training=True` or of one of several processes. From `fit`, before it
            trains: for data without texts or images, callbacks that write the same
            metrics, or a model that is not a `ContrastiveModel`.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any = None,
        every: int = 1,
        ks: int | Sequence[int] = (1, 5, 10),
        duplicates: str = "positive",
        name: str | None = None,
    ):
        options = dict(tokenizer=tokenizer, ks=ks, duplicates=duplicates)
        super().__init__(data, every, name, "evaluate_retrieval", **options)


class ZeroShot(Evaluation):
    """Computes the accuracy of zero-shot classification during `fit`.

    Adds `val_zero_shot_top_1` and the other metrics of
    `kcm.evaluation.evaluate_zero_shot` to the logs. See `kcm.callbacks.Retrieval` for
    the order of callbacks, epochs without evaluation, weights and processes.

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
        data: See `kcm.evaluation.embed`. Batches hold `"images"` and `"labels"`,
            indices into `class_names`. Read again in each evaluation.
        class_names: List of str.
        tokenizer: See `kcm.evaluation.embed`.
        templates: See `kcm.evaluation.zero_shot_classifier`.
        every: Integer. The number of epochs between evaluations.
        ks: See `kcm.evaluation.classification_accuracy`.
        name: String, or `None`. Distinguishes several callbacks: `name="cifar10"`
            writes `val_cifar10_top_1`.

    Raises:
        ValueError: For an iterator, and for an `image_text_dataset` with
            `training=True`, of one of several processes, or with `class_names` in
            another order. From `fit`, before it trains: for arguments that
            `kcm.evaluation.evaluate_zero_shot` does not accept, callbacks that write
            the same metrics, or a model that is not a `ContrastiveModel`.
    """

    def __init__(
        self,
        data: Any,
        class_names: Sequence[str],
        tokenizer: Any,
        templates: Templates = ("a photo of a {}.",),
        every: int = 1,
        ks: int | Sequence[int] = (1, 5),
        name: str | None = "zero_shot",
    ):
        from keras_cluster_mask.evaluation.checks import check_class_order

        options = dict(
            class_names=class_names, tokenizer=tokenizer, templates=templates, ks=ks
        )
        super().__init__(data, every, name, "evaluate_zero_shot", **options)
        check_class_order("data", data, class_names)
