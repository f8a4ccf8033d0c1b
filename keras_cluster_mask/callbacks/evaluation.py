import collections.abc
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.batches import check_not_empty, read_batches
from keras_cluster_mask.checks import check_integer, is_number
from keras_cluster_mask.distribution.backends import copy_values
from keras_cluster_mask.distribution.processes import all_gather_object
from keras_cluster_mask.encoders.embedder import Embedder
from keras_cluster_mask.training.checkpoints import RunCallback
from keras_cluster_mask.types import EvaluationData, Templates, Tokenizer


class Evaluate(RunCallback):
    """Evaluates the model during `fit` with a function, and logs the metrics.

    At the end of an epoch, each metric is added to the logs as `val_` and its name: for
    the progress bar, the `History` that `fit` returns, and all later callbacks in the
    list. Put this callback before `keras.callbacks.ModelCheckpoint`, `EarlyStopping`,
    `CSVLogger`, `TensorBoard` and `kcm.callbacks.Checkpoint`. Pass `mode="max"` to
    callbacks that monitor a metric like accuracy.

    With `every=n`, epochs n, 2n and so on are evaluated, the first epoch of a `fit`,
    and the last of its `epochs`. In other epochs, the logs repeat the last metrics,
    since Keras's callbacks do not support missing ones: `ModelCheckpoint` would save an
    epoch without metrics as the best one. A repeated metric does not count as an
    improvement. Patience is counted in epochs: give `EarlyStopping` a multiple of n.

    The weights at the end of the epoch are evaluated, as in Keras's own validation.
    With `use_ema=True`, these are not the averages, which `fit` assigns when it ends.
    To evaluate the averages, put `keras.callbacks.SwapEMAWeights(swap_on_epoch=True)`
    before this callback. An epoch without a finite loss is not evaluated: its metrics
    are NaN, or missing if no epoch was evaluated before.

    If the function returns a dictionary under `"chance"`, as
    `kcm.evaluation.evaluate_retrieval` does, its values are not logged. `fit` prints
    them once, and the attribute `chance` holds them.

    With several processes, each calls the function, and the metrics of the main process
    are logged. Give all processes the same callbacks and the same, complete data: on
    JAX, an `image_text_dataset(..., process=(0, 1))`.

    Example:

    ```python
    def similarity(model):
        found = kcm.evaluation.embed(model, batch, verbose=0)
        products = found["image_embeddings"] * found["text_embeddings"]
        return {"similarity": float(products.sum(axis=1).mean())}


    images = np.random.randint(0, 256, (30, 32, 32, 3)).astype("uint8")
    token_ids = np.random.randint(1, 100, (30, 16)).astype("int32")
    batch = {"images": images, "token_ids": token_ids}
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    model.compile(optimizer="adam")
    callbacks = [kcm.callbacks.Evaluate(similarity, every=2)]
    history = model.fit(batch, batch_size=10, epochs=3, callbacks=callbacks)
    print(history.history["val_similarity"])
    ```

    Args:
        function: A function from a model to a dictionary from names to floats. The
            model has no masking. All functions of `kcm.evaluation` accept it, and
            compile it once per `fit`. Its attribute `model` is the `ContrastiveModel`.
        every: Integer. The number of epochs between evaluations.
        name: String. Distinguishes several callbacks: `name="coco"` writes
            `val_coco_recall` for `recall`.

    Raises:
        ValueError: From `fit`, for metrics that are not floats or that another callback
            writes, and for a model that is not a `ContrastiveModel`.
    """

    def __init__(
        self,
        function: Callable[[Any], dict[str, float]],
        every: int = 1,
        name: str | None = None,
    ):
        super().__init__()
        self.function = function
        self.every = check_integer("every", every)
        self.name = name
        self.chance: dict[str, float] = {}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        self._is_first = True
        self._metrics = {}
        self._embedder = Embedder(self.model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._is_first or self._is_due(epoch, self.every):
            self._metrics = self._evaluate_epoch(logs.get("loss", 0.0))
        self._is_first = False
        self._add(self._metrics, logs)

    def _evaluate_epoch(self, loss):
        # Training has failed, and another callback may be about to stop it.
        if not math.isfinite(loss):
            return dict.fromkeys(self._metrics, math.nan)
        copy_values(self.model.trainable_variables)
        metrics = self._evaluate()
        # Use the metrics of the main process: devices round differently, and all
        # processes must stop at the same epoch.
        values = all_gather_object(np.array([*metrics.values()]))[0]
        if self._is_first and self.chance and self.params["verbose"]:
            chance = (f"{name} {value:.3g}" for name, value in self.chance.items())
            print("\nChance:", ", ".join(chance))
        return dict(zip(metrics, map(float, values)))

    def _evaluate(self, **options):
        metrics = self.function(self._embedder, **options)
        prefix = f"{self.name}_" if self.name else ""
        if isinstance(metrics, dict) and isinstance(metrics.get("chance"), dict):
            metrics = {**metrics}
            chance = metrics.pop("chance")
            self.chance = {f"{prefix}{name}": x for name, x in chance.items()}
        if not isinstance(metrics, dict) or not all(map(is_number, metrics.values())):
            raise ValueError(
                "`function` must return a dictionary that maps names to floats. "
                f"Received: {metrics!r}"
            )
        # Keras's callbacks recognize metrics of validation by `val_`.
        return {f"val_{prefix}{name}": value for name, value in metrics.items()}

    def _add(self, metrics, logs):
        # Keras passes one dictionary to all callbacks.
        taken = metrics.keys() & logs.keys()
        if taken:
            raise ValueError(
                "`name` must distinguish the metrics of this callback from all others: "
                f"pass another `name`. Received: name={self.name!r}, and "
                f"{sorted(taken)}, which are already logged"
            )
        logs.update(metrics)


class EvaluateData(Evaluate):
    """Evaluates data, and one batch before training, to find errors early.

    Args:
        function: A function of `kcm.evaluation`, of a model and data.
        data: The data, read again in each evaluation.
        every: See `Evaluate`.
        name: See `Evaluate`.
        **options: Further arguments of the function.
    """

    def __init__(
        self,
        function: Callable,
        data: EvaluationData,
        every: int,
        name: str | None,
        **options: Any,
    ):
        # Imported here: evaluation needs packages that `import keras` does not.
        from keras_cluster_mask.evaluation.inputs import check_whole

        if isinstance(data, collections.abc.Iterator):
            raise ValueError(
                "`data` must be readable more than once: pass arrays, an "
                "`image_text_dataset`, a `tf.data.Dataset` or a `PyDataset`. Received: "
                f"an iterator of type {type(data).__name__}"
            )
        check_whole(data)
        self.data = data
        evaluate = functools.partial(function, data=data, verbose=0, **options)
        super().__init__(evaluate, every=every, name=name)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        from keras_cluster_mask.evaluation.inputs import pairs_of

        super().on_train_begin(logs)
        batches = read_batches(pairs_of(self.model, self.data))
        batch = next((each for each in batches if len(each["images"])), None)
        check_not_empty(batch is not None, self.data)
        self._metrics = self._evaluate(data=[batch])
        self._add(self._metrics, logs)


class Retrieval(EvaluateData):
    """Computes the metrics of `kcm.evaluation.evaluate_retrieval` during `fit`.

    Adds `val_image_to_text_recall@1` and the other metrics to the logs. `fit` prints
    the recall at chance once, and the attribute `chance` holds it. See
    `kcm.callbacks.Evaluate` for the order of callbacks, epochs without evaluation,
    weights and processes.

    Masking is off. Training is bit for bit the same as without the callback. The first
    batch is evaluated before training, to find errors early.

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
            `training=True` or for one of several processes. From `fit`, before
            training: for data without texts or images, callbacks that write the same
            metrics, or a model that is not a `ContrastiveModel`.
    """

    def __init__(
        self,
        data: EvaluationData,
        tokenizer: Tokenizer | None = None,
        every: int = 1,
        ks: int | Sequence[int] = (1, 5, 10),
        duplicates: str = "positive",
        name: str | None = None,
    ):
        from keras_cluster_mask.evaluation import evaluate_retrieval

        super().__init__(
            evaluate_retrieval,
            data=data,
            every=every,
            name=name,
            tokenizer=tokenizer,
            ks=ks,
            duplicates=duplicates,
        )


class ZeroShot(EvaluateData):
    """Computes the accuracy of zero-shot classification during `fit`.

    Adds `val_zero_shot_top_1` and the other metrics of
    `kcm.evaluation.evaluate_zero_shot` to the logs. See `kcm.callbacks.Evaluate` for
    the order of callbacks, epochs without evaluation, weights and processes. Masking,
    training and the first batch work as in `kcm.callbacks.Retrieval`.

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
            `training=True`, for one of several processes, or with other `class_names`.
            From `fit`, before training: for arguments that
            `kcm.evaluation.evaluate_zero_shot` does not accept, callbacks that write
            the same metrics, or a model that is not a `ContrastiveModel`.
    """

    def __init__(
        self,
        data: EvaluationData,
        class_names: Sequence[str],
        tokenizer: Tokenizer | None = None,
        templates: Templates = ("a photo of a {}.",),
        every: int = 1,
        ks: int | Sequence[int] = (1, 5),
        name: str | None = "zero_shot",
    ):
        from keras_cluster_mask.evaluation import evaluate_zero_shot
        from keras_cluster_mask.evaluation.inputs import check_class_names

        super().__init__(
            evaluate_zero_shot,
            data=data,
            every=every,
            name=name,
            class_names=class_names,
            tokenizer=tokenizer,
            templates=templates,
            ks=ks,
        )
        check_class_names(data, class_names)
