import json
import math

import keras

from keras_cluster_mask.callbacks.checkpoint_files import CheckpointFiles
from keras_cluster_mask.callbacks.remaining_data import Remaining
from keras_cluster_mask.callbacks.training_state import (
    describe,
    differences,
    read_state,
    write_state,
)
from keras_cluster_mask.distribution import (
    is_main_process,
    read_generators,
    values_of_all,
    write_generators,
)


class NonFiniteLossError(FloatingPointError):
    """The loss has become NaN or infinite, and training on would be in vain."""


class Checkpoint(keras.callbacks.Callback):
    """Saves a training run, and goes on where it was cut off.

    Put it among the callbacks of `ContrastiveModel.fit`. If the folder holds a
    checkpoint, `fit` goes on from there, in the middle of an epoch too; if not, it
    starts from the beginning. So a run that was killed is continued by starting the
    same program again. On one machine and in float32 it ends, bit for bit, at the
    weights of a run that was never cut off.

    A checkpoint is one file, written beside its place and then renamed: a run killed
    while it saves leaves the checkpoint before. It holds weights, optimizer, averages,
    the learning rate's and a masking's step, the masking's threshold, all seeds, the
    metrics of the running epoch, the history, and the position in the data.

    The position is exact for an `image_text_dataset` with a `seed`. Other `tf.data`
    datasets skip the steps that were done, so they must give the same batches each
    time; arrays need `shuffle=False`. The state of other callbacks is not saved, and
    the rest of an epoch that was cut off is to them a training of its own:
    `CSVLogger` needs `append=True`.

    A loss that is NaN or infinite stops the run with an error that names the step, the
    last checkpoint, and the samples of the batch if they are known: of an
    `image_text_dataset` for training, and of data with an entry `"sample_id"` (strings
    or numbers; of arrays with `shuffle=False`). Nothing is saved of such a step.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_clip(backbone)
    model.compile(optimizer="adam")
    batch = {
        "images": np.random.randint(0, 256, (8, 32, 32, 3)).astype("uint8"),
        "token_ids": np.random.randint(1, 100, (8, 12)).astype("int32"),
    }
    checkpoint = kcm.callbacks.Checkpoint("checkpoints", save_every=1, monitor=None)
    model.fit(batch, batch_size=4, shuffle=False, callbacks=[checkpoint])
    # Goes on with the second epoch.
    model.fit(batch, batch_size=4, shuffle=False, epochs=2, callbacks=[checkpoint])
    ```

    Args:
        directory: str or path. The folder of this run's checkpoints.
        save_every: Integer, steps between checkpoints, or `"epoch"`. The end of an
            epoch is saved in any case.
        keep: Integer. How many of the last checkpoints stay.
        monitor: String. The value of the epoch's logs by which `best.npz` is chosen;
            `None` keeps no best one.
        mode: `"min"` or `"max"`. Defaults to `"min"` for losses, else `"max"`.

    Raises:
        ValueError: From `fit`, if the checkpoint is of another model, masking,
            optimizer or data seed; it lists what differs.
        NonFiniteLossError: From `fit`, if the loss is NaN or infinite.
    """

    def __init__(
        self, directory, save_every="epoch", keep=3, monitor="val_loss", mode=None
    ):
        super().__init__()
        if save_every != "epoch" and not (
            isinstance(save_every, int) and save_every > 0
        ):
            raise ValueError(
                "`save_every` must be 'epoch' or a positive integer. "
                f"Received: save_every={save_every!r}"
            )
        if not (isinstance(keep, int) and keep > 0):
            raise ValueError(
                f"`keep` must be a positive integer. Received: keep={keep!r}"
            )
        if mode not in (None, "min", "max"):
            raise ValueError(
                f"`mode` must be 'min', 'max' or None. Received: mode={mode!r}"
            )
        self.files = CheckpointFiles(directory, keep)
        self.save_every = save_every
        self.monitor = monitor
        self.sign = 1.0
        if mode == "max" or (mode is None and "loss" not in (monitor or "")):
            self.sign = -1.0
        self._remaining = None

    # === Going on ===

    def fit_from_last(self, model, data, options, run, evaluate):
        """Trains from the last checkpoint to the end. Called by `ContrastiveModel.fit`.

        Args:
            model: The model, compiled.
            data: What was passed to `fit` as `x`.
            options: Dictionary with `batch_size`, `shuffle`, `steps_per_epoch`,
                `initial_epoch`, `epochs`.
            run: `run(data, initial_epoch, epochs, steps_done)`, Keras's own `fit`.
            evaluate: Function that returns the logs of a validation.

        Returns:
            A `keras.callbacks.History` of all epochs, those before the cut as well.
        """
        if not model.built or model.optimizer is None:
            raise ValueError(
                "`Checkpoint` needs a compiled and built model: compile it with an "
                "optimizer, and call it on a batch. "
                f"Received: built={model.built}, optimizer={model.optimizer}"
            )
        self._remaining = Remaining(data, options)
        self._remaining.check(within_epochs=self.save_every != "epoch")
        history, epochs = None, options["epochs"]
        # An epoch that was cut off is a run of its own, since Keras takes the steps of
        # the first epoch for those of all. The next run starts from its last save.
        while True:
            self._restore(model, options["initial_epoch"], evaluate)
            if self._epoch >= epochs:
                break
            last = self._epoch + 1 if self._step else epochs
            rest = self._remaining.after(self._epoch, self._step)
            history = run(rest, self._epoch, last, self._step)
            if last == epochs or model.stop_training:
                break
        if history is None:
            history = keras.callbacks.History()
            model.optimizer.finalize_variable_values(model.trainable_weights)
        history.epoch = [row["epoch"] for row in self._history]
        history.history = {}
        for row in self._history:
            for name, value in row["logs"].items():
                history.history.setdefault(name, []).append(value)
        return history

    def _restore(self, model, initial_epoch, evaluate):
        self._epoch, self._step, self._total = initial_epoch, 0, 0
        self._history, self._best = [], math.inf
        self._metrics = self._generators = None
        # The first process may still be writing what all are to read.
        values_of_all(0)
        found = self.files.read_last()
        steps = values_of_all(-1 if found is None else found[2]["step"])
        if len({*steps}) > 1:
            raise ValueError(
                "`directory` must be a folder that all processes see. Received: "
                f"directory={self.files.folder}, last steps {steps} by process"
            )
        if found is None:
            return
        path, arrays, facts = found
        wanted = {**describe(model), **self._remaining.describe()}
        differing = differences(facts["description"], _as_read(wanted))
        if differing:
            raise ValueError(
                f"The checkpoint {path} is of another run. Use another `directory`, or "
                "make model and data as they were. Received: " + "; ".join(differing)
            )
        write_state(model, arrays)
        self._generators = {
            key: value for key, value in arrays.items() if key.startswith("generators/")
        }
        self._epoch, self._step = facts["epoch"], facts["epoch_step"]
        self._total, self._history = facts["step"], facts["history"]
        self._best = math.inf if facts["best"] is None else facts["best"]
        self._remaining.pairs = facts["pairs"]
        if self._step:
            if not self._remaining.is_over(self._epoch, self._step):
                self._metrics = arrays
            else:
                # The epoch had come to its end, but for the report of it.
                write_state(model, arrays, groups=("metrics",))
                logs = model.get_metrics_result()
                self.set_model(model)
                self.on_epoch_end(self._epoch, {**logs, **evaluate()})

    # === Callbacks ===

    def on_train_begin(self, logs=None):
        if self._remaining is None:
            raise ValueError(
                "`Checkpoint` works with the `fit` of a `ContrastiveModel`. "
                f"Received: a {type(self.model).__name__}"
            )

    def on_epoch_begin(self, epoch, logs=None):
        self._remaining.start(epoch, self._step)
        if self._metrics is not None:
            write_state(self.model, self._metrics, groups=("metrics",))
            self._metrics = None
        self._before, self._seen = self._step, 0
        self._epoch = epoch
        self._is_first_step = True

    def on_train_batch_begin(self, batch, logs=None):
        # Data loaders draw from the same generators between the last step of an epoch
        # and the first of the next, how often depends on where the run began.
        if self._is_first_step and self._generators is not None:
            write_generators(self._generators)
        self._is_first_step = False

    def on_train_batch_end(self, batch, logs=None):
        before, self._total = self._total, self._total + batch + 1 - self._seen
        self._seen = batch + 1
        self._step = self._before + self._seen
        self._generators = read_generators()
        self._check_loss(logs)
        if self.save_every == "epoch":
            return
        # With `steps_per_execution` several steps end at once.
        if self._total // self.save_every > before // self.save_every:
            self._save(self._epoch, self._step)

    def on_epoch_end(self, epoch, logs=None):
        logs = self._add_row(epoch, logs or {})
        self._epoch, self._step = epoch + 1, 0
        value = self.sign * logs.get(self.monitor, math.nan)
        is_best = value < self._best
        if is_best:
            self._best = value
        path = self._save(self._epoch, 0)
        if is_best and path is not None:
            self.files.mark_best(path)

    def _add_row(self, epoch, logs):
        logs = {name: float(value) for name, value in logs.items()}
        self._history.append({"epoch": epoch, "logs": logs})
        return logs

    def _save(self, epoch, step):
        model = self.model
        facts = {
            "step": self._total,
            "epoch": epoch,
            "epoch_step": step,
            "pairs": self._remaining.pairs,
            "history": self._history,
            "best": None if math.isinf(self._best) else self._best,
            "description": {**describe(model), **self._remaining.describe()},
        }
        arrays = {**read_state(model), **(self._generators or {})}
        if not is_main_process():
            return None
        return self.files.write(self._total, arrays, facts)

    def _check_loss(self, logs):
        loss = float((logs or {}).get("loss", 0.0))
        if math.isfinite(loss):
            return
        last = self.files.paths()
        keys = self._remaining.keys_of(self._epoch, self._step - 1)
        samples = ""
        if keys:
            more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
            samples = f" The batch held the samples {', '.join(keys[:10])}{more}."
        raise NonFiniteLossError(
            "The loss must stay finite; a lower learning rate, a longer warm-up or "
            f"gradient clipping may help.{samples} The last good checkpoint is "
            f"{last[-1] if last else 'none'}. Received: loss={loss} at step "
            f"{self._total} (epoch {self._epoch + 1}, its step {self._step})"
        )


def _as_read(description):
    # As it is after a round trip through a file.
    return json.loads(json.dumps(description))
