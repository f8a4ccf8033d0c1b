import math
import os
from typing import Any

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.processes import all_gather_object, is_main_process
from keras_cluster_mask.training.checkpoints import CheckpointFiles
from keras_cluster_mask.training.fitting import RunCallback
from keras_cluster_mask.training.run_state import find_non_finite, read_state

# The number of steps between two checks of the loss. A check of each step would keep
# the device waiting.
CHECK_EVERY = 100


class NonFiniteError(FloatingPointError):
    """Raised if the loss or a weight is NaN or infinite: training cannot continue."""


class Checkpoint(RunCallback):
    """Saves all the state of a training run, for `fit(..., resume_from=directory)`.

    A checkpoint is written at the end of an epoch. For an endless dataset,
    `fit(..., steps_per_epoch=500)` sets the length of an epoch, so a killed run loses
    at most that many steps.

    A checkpoint is one file. It is written under a temporary name and then renamed, so
    a run killed while saving keeps the previous checkpoint. It holds the weights, the
    optimizer state, moving averages, the steps of the learning rate and the masking,
    the threshold of the masking, all random seeds, the history, and the position in the
    data. See `ContrastiveModel.fit` for resuming. To keep the best model, use
    `keras.callbacks.ModelCheckpoint` as well.

    Training waits until the file is written.

    An `image_text_dataset` resumes at the next batch, even with another number of
    workers or processes; other data, seeds or options are refused. For other data, each
    epoch is a pass over it. The state of other callbacks is not saved. An epoch that a
    callback stops early is not saved either.

    A NaN or infinite loss stops the run with an error that names the last checkpoint,
    and the steps among which the loss occurred. The mean loss of the epoch is read
    every 100 steps and at the end of the epoch, because reading it makes training wait.
    A model whose own `metrics` leave out the loss is checked at saves alone. A NaN or
    infinite weight or optimizer moment at a save stops the run too. Such an epoch is
    not saved.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    model.compile(optimizer="adam")
    batch = {
        "images": np.random.randint(0, 256, (8, 32, 32, 3)).astype("uint8"),
        "token_ids": np.random.randint(1, 100, (8, 12)).astype("int32"),
    }
    fit = dict(
        batch_size=4,
        resume_from="checkpoints",
        callbacks=[kcm.callbacks.Checkpoint("checkpoints")],
    )
    model.fit(batch, **fit)
    model.fit(batch, epochs=2, **fit)  # Resumes: trains the second epoch.
    ```

    Args:
        directory: str or path. The folder of this run's checkpoints: local, or a URL
            that fsspec knows, such as `"gs://bucket/run"`.
        save_every: Integer, the number of epochs between checkpoints. The last epoch is
            always saved.
        keep: Integer. The number of latest checkpoints to keep.

    Raises:
        ValueError: From `fit`, if the folder holds later checkpoints than the run
            resumes from, or if the data cannot be resumed.
        OSError: From `fit`, if a file cannot be written.
        NonFiniteError: From `fit`, if the loss, a weight or the optimizer's state is
            NaN or infinite.
    """

    def __init__(
        self, directory: str | os.PathLike, save_every: int = 1, keep: int = 3
    ):
        super().__init__()
        self.files = CheckpointFiles(directory, check_integer("keep", keep))
        self.save_every = check_integer("save_every", save_every)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        run = self.run
        run.data.check_resumable()
        if any(getattr(x, "swap_on_epoch", False) for x in run.callbacks):
            raise ValueError(
                "`callbacks` must not hold a `Checkpoint` together with "
                "`SwapEMAWeights(swap_on_epoch=True)`, which exchanges weights and "
                "averages while they are saved: pass `swap_on_epoch=False`. Received: "
                f"callbacks of types {[type(x).__name__ for x in run.callbacks]}"
            )
        # All processes raise the error, even if some do not see the file.
        last = max(all_gather_object(self.files.last_epoch()))
        if last > run.epoch:
            raise ValueError(
                "`directory` must not hold later checkpoints than this run starts "
                "from: pass `resume_from=directory` to `fit`, or use another one. "
                f"Received: directory={self.files.folder}, with a checkpoint of "
                f"{last} epochs; the run starts after {run.epoch}"
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch, self._checked = epoch, 0

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # Not in `on_train_batch_end`: Keras waits for each step if a callback overrides
        # it. The steps before this batch may still be running.
        if batch >= self._checked + CHECK_EVERY:
            loss = self.model.get_metrics_result().get("loss", 0.0)
            self._check_loss(float(loss), f"step {batch}")
            self._checked = batch

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._check_loss((logs or {}).get("loss", 0.0), "the end")
        if not self._is_due(epoch, self.save_every) or self.run.is_partial:
            return
        # In all processes, since the weights may be sharded over them.
        state = read_state(self.model)
        # NaN or infinity is possible even if the loss is finite.
        path = find_non_finite(self.model, state)
        # All processes must stop, or the others would wait for one that has stopped.
        if any(all_gather_object(int(path is not None))):
            path = path or "a weight of another process"
            self._stop("The weights and the optimizer's state", f"{path} at the end")
        if is_main_process():
            facts = self.run.facts(self.model)
            self.files.write({**state, **self.run.rng_state}, facts)

    def _check_loss(self, loss, last):
        """Raises an error if the mean loss of the epoch up to a step is not finite."""
        if not math.isfinite(loss):
            place = f"between step {self._checked + 1} and {last}"
            self._stop("The loss", f"loss={loss} {place}")

    def _stop(self, what, found):
        last = self.files.paths()
        raise NonFiniteError(
            f"{what} must stay finite; a lower learning rate, a longer warm-up or "
            "gradient clipping may help. The last good checkpoint is "
            f"{last[-1] if last else 'none'}. Received: {found} of epoch "
            f"{self._epoch + 1}"
        )
