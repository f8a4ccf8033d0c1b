import math
import os
import weakref
from typing import Any

import keras

from keras_cluster_mask.callbacks.checks import model_of
from keras_cluster_mask.checks import check_choice, check_integer
from keras_cluster_mask.distribution.processes import (
    all_gather_object,
    is_main_process,
)
from keras_cluster_mask.training.checkpoints import (
    CheckpointFiles,
    finish_writing_everywhere,
    writing_error,
)
from keras_cluster_mask.training.run_state import (
    describe,
    find_non_finite,
    read_state,
)

# A loss that is not finite is noticed after so many steps at the latest. To look after
# each step would keep the device waiting.
CHECK_EVERY = 100


class NonFiniteError(FloatingPointError):
    """The loss, or a weight, is NaN or infinite: training cannot continue."""


class Checkpoint(keras.callbacks.Callback):
    """Saves all the state of a training run, for `fit(..., resume_from=directory)`.

    A checkpoint is one file. It is written under a temporary name and then renamed, so
    a run killed while saving keeps the previous checkpoint. It holds the weights, the
    optimizer, moving averages, the steps of the learning rate and the masking, the
    threshold of the masking, all seeds, the metrics of the current epoch, the history,
    and the position in the data. See `ContrastiveModel.fit` for resuming.

    Training waits while the state is copied to the host's memory. A thread writes the
    file while training continues, and the copy is held until it is written; the next
    save waits for that, and so does the end of `fit`. There is never more than one
    copy.

    An `image_text_dataset` continues with the next batch, also with another number of
    workers or processes; other data, seeds or options are refused. Other `tf.data`
    datasets skip the steps that were done, so they must give the same batches each
    time. The state of other callbacks is not saved.

    The options of `compile` may change: a learning rate or schedule, weight decay,
    clipping, multipliers. A resumed run takes those that it is given, with a warning
    that lists them. Moments and the number of steps are the checkpoint's, and so is a
    learning rate that a callback has changed, unless another one is given.

    A loss that is NaN or infinite stops the run with an error that names the step, the
    last checkpoint, and the samples of the batch if they are known: of an
    `image_text_dataset` for training, and of data with an entry `"sample_id"` (strings
    or numbers). The run stops at the end of the epoch, before the next save, or after
    100 steps, whichever comes first, because a check of each step would make training
    wait. A weight or a moment of the optimizer that is NaN or infinite when it is to be
    saved stops it too. Nothing is saved of such a step, or after it.

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
        save_every: Integer, steps between checkpoints, or `"epoch"`. The end of an
            epoch is saved in any case.
        keep: Integer. How many of the last checkpoints are kept.
        monitor: String. The value of the epoch's logs by which `best.npz` is chosen,
            such as `"val_loss"`; `None` keeps no best one.
        mode: `"min"` or `"max"`. Defaults to `"min"` for losses, else `"max"`.

    Raises:
        ValueError: From `fit`, if the folder holds later checkpoints than the run
            resumes from, if the data could not be resumed, or if an epoch ends whose
            logs do not hold `monitor`.
        OSError: From `fit`, at the next save or at its end, if a file cannot be
            written.
        NonFiniteError: From `fit`, if the loss, a weight or the optimizer's state is
            NaN or infinite.
    """

    # Tells `fit` to keep count of steps.
    saves_training_state = True

    def __init__(
        self,
        directory: str | os.PathLike,
        save_every: int | str = "epoch",
        keep: int = 3,
        monitor: str | None = None,
        mode: str | None = None,
    ):
        super().__init__()
        if isinstance(save_every, str):
            check_choice("save_every", save_every, ("epoch",))
        else:
            save_every = check_integer("save_every", save_every)
        check_choice("mode", mode, (None, "min", "max"))
        if mode is not None and monitor is None:
            raise ValueError(
                "`mode` needs `monitor`, the value that it says the best of. "
                f"Received: mode={mode!r}, monitor=None"
            )
        self.files = CheckpointFiles(directory, check_integer("keep", keep))
        self.save_every = save_every
        self.monitor = monitor
        self.sign = 1.0
        if mode == "max" or (mode is None and "loss" not in (monitor or "")):
            self.sign = -1.0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        run = model_of(self, "training_run").training_run
        run.data.check_resumable(within_epochs=self.save_every != "epoch")
        # All processes raise the error, though a file may not be seen by all of them.
        last = max(all_gather_object(self.files.last_step()))
        if last > run.total_steps:
            raise ValueError(
                "`directory` must not hold later checkpoints than this run starts "
                "from: pass `resume_from=directory` to `fit`, or use another one. "
                f"Received: directory={self.files.folder}, with a checkpoint of step "
                f"{last}; the run starts from step {run.total_steps}"
            )
        # The run holds the data, longer than a fit that is interrupted.
        self._run = weakref.ref(run)
        self._saved_steps = self._checked_steps = run.total_steps
        self._best = math.inf
        for row in run.history:
            self._best = min(self._best, self._value(row["logs"]))

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # Not at the end of a batch: Keras waits for each step if a callback wants to
        # know of that. The steps before this batch may still be running.
        run, every = self._run(), self.save_every
        steps, saved = run.total_steps, self._saved_steps
        # With `steps_per_execution` several steps begin at once.
        is_due = every != "epoch" and steps // every > saved // every
        if is_due or steps - self._checked_steps >= CHECK_EVERY:
            run.count_steps()
            self._check_loss()
        if is_due:
            self._save()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # The run has counted the steps.
        self._check_loss()
        # Of an epoch that a callback stopped, the rest is still to come.
        value = math.inf if self._run().unfinished else self._value(logs or {})
        self._save(is_best=value < self._best)
        self._best = min(self._best, value)
        self._check_monitor(epoch, logs or {})

    def _check_monitor(self, epoch, logs):
        run, name = self._run(), self.monitor
        if name is None or run.skips_validation(epoch):
            return
        # A callback may report it at the end of some epochs, the first one included.
        if not any(name in row["logs"] for row in [*run.history, *run.unfinished]):
            raise ValueError(
                "`monitor` must be in the logs of an epoch: pass `validation_data` to "
                "`fit`, and put a callback that reports it before `Checkpoint`. "
                f"Received: monitor={name!r}, logs with {sorted(logs)}"
            )

    def _value(self, logs):
        value = self.sign * logs.get(self.monitor, math.inf * self.sign)
        return math.inf if math.isnan(value) else value

    def _save(self, is_best=False):
        run, model = self._run(), self.model
        history = [
            {
                "epoch": row["epoch"],
                "logs": {k: float(v) for k, v in row["logs"].items()},
            }
            for row in run.history
        ]
        facts = {
            "step": run.total_steps,
            "epoch": run.epoch,
            "epoch_step": run.step,
            "data_origin": run.data.origin,
            "history": history,
            "unfinished": bool(run.unfinished),
            "description": {**describe(model), **run.data.describe()},
            "compiled": run.compiled,
        }
        # One copy at a time.
        finish_writing_everywhere()
        # By all processes, which may share the weights.
        state = read_state(model)
        self._check_state(state)
        self._saved_steps = run.total_steps
        if is_main_process():
            arrays = {**state, **run.rng_state}
            self.files.start_writing(run.total_steps, arrays, facts, is_best)

    def _check_loss(self):
        run = self._run()
        self._checked_steps = run.total_steps
        found = run.non_finite
        if found is not None:
            where = f"loss={found.loss} at"
            self._stop("The loss", where, found.total_steps, found.epoch, found.step)

    def _check_state(self, state):
        """Finite weights may be infinite after an update at a finite loss."""
        path = find_non_finite(self.model, state)
        # All processes stop, or the others would wait for one that has.
        if any(all_gather_object(int(path is not None))):
            path, run = path or "a weight of another process", self._run()
            what = "The weights and the optimizer's state"
            self._stop(what, f"{path} after", run.total_steps, run.epoch, run.step)

    def _stop(self, what, found, total_steps, epoch, step):
        failed = writing_error()
        # The others list the folder once the main process has written.
        all_gather_object(0)
        run, last = self._run(), self.files.paths()
        keys = run.data.samples(epoch, step - 1)
        samples = ""
        if keys:
            more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
            samples = f" The batch held the samples {', '.join(keys[:10])}{more}."
        place = f"the end of epoch {epoch}"
        if step:
            place = f"epoch {epoch + 1}, its step {step}"
        error = NonFiniteError(
            f"{what} must stay finite; a lower learning rate, a longer warm-up or "
            f"gradient clipping may help.{samples} The last good checkpoint is "
            f"{last[-1] if last else 'none'}. Received: {found} step "
            f"{total_steps} ({place})"
        )
        if failed is not None:
            error.add_note(f"A checkpoint could not be written either: {failed!r}")
        raise error
