"""Several calls of `fit` as one run, which resumes in the stage where it stopped."""

import json
import math
import time
import warnings

import keras
import numpy as np

from keras_cluster_mask.distribution.backends import print_backend
from keras_cluster_mask.distribution.processes import to_numpy
from keras_cluster_mask.distribution.replicas import is_main_process, verbosity
from keras_cluster_mask.training.checkpoints import Checkpoint, describe_model
from keras_cluster_mask.training.features import local_folder
from keras_cluster_mask.training.layers import differences

# The file of the weights and settings that a run starts from.
START = "start.npz"


class Stages:
    """A run of several stages, each a call of `fit`.

    Args:
        model: A built `ContrastiveModel`.
        folder: str or path, where the run is kept, or `None`. The folder of an earlier
            run must be of the same model and settings. The model gets the weights that
            this run started with, as an interrupted run may have changed them.
        settings: Dictionary of JSON values, which must be the same when a run resumes.
        verbose: As in `fit`.

    Attributes:
        history: A `keras.callbacks.History` of all epochs, with the `"stage"` of each.
            Metrics that an epoch does not have are `None`.
    """

    def __init__(self, model, folder, settings, verbose):
        self.model, self.verbose = model, verbosity(verbose)
        if self.verbose:
            print_backend()
        self.folder = None if folder is None else local_folder(folder)
        self.history, self._epochs = keras.callbacks.History(), []
        shapes = [str(tuple(variable.shape)) for variable in model.variables]
        self._settings = {**settings, **describe_model(model), "variables": shapes}
        if folder is not None and (self.folder / START).exists():
            self._restart()

    def say(self, line):
        if self.verbose:
            print(line, flush=True)

    def fit(self, stage, data, epochs, callbacks=(), save_every=1, **options):
        """Trains a stage, or the rest of an interrupted stage."""
        duration = _Duration(self, stage)
        callbacks = [*callbacks, duration]
        if self.folder is not None:
            self._save_start()
            folder = self.folder / stage
            callbacks.append(Checkpoint(folder, save_every, keep=1))
            if folder.exists():
                options["resume_from"] = folder
        options = {"callbacks": callbacks, "verbose": self.verbose, **options}
        found = self.model.fit(data, epochs=epochs, **options)
        if not duration.steps:
            self.say(f"{duration.stage}: already finished.")
        self._epochs += [{"stage": stage, **row["logs"]} for row in found.rows]
        names = dict.fromkeys(name for epoch in self._epochs for name in epoch)
        self.history.epoch = [*range(len(self._epochs))]
        self.history.history = {
            name: [epoch.get(name) for epoch in self._epochs] for name in names
        }

    def _save_start(self):
        """Saves what the run starts from, before its first step."""
        # Imported here: it needs packages that Keras does not.
        from keras_cluster_mask.data.files import replacing

        path = self.folder / START
        # All processes gather values that are spread over them.
        values = [*map(to_numpy, self.model.variables)]
        if is_main_process() and not path.exists():
            settings = np.array(json.dumps(self._settings, default=float))
            with replacing(path) as file:
                np.savez(file, *values, settings=settings)

    def _restart(self):
        """Compares what the run started from, and restores the weights."""
        with np.load(self.folder / START) as file:
            found = dict(file)
        then = json.loads(str(found["settings"]))
        if differing := [*differences(then, self._settings)]:
            raise ValueError(
                "`folder` must be from the same run: pass another folder, or the same "
                f"model, data and settings. Received: folder={self.folder}, with "
                + "; ".join(differing[:10])
            )
        encoders = self.model.image_encoder, self.model.text_encoder
        theirs = {id(weight) for encoder in encoders for weight in encoder.weights}
        has_changed = False
        for index, variable in enumerate(self.model.variables):
            values = found[f"arr_{index}"]
            if id(variable) in theirs and keras.backend.is_float_dtype(variable.dtype):
                has_changed |= not np.array_equal(to_numpy(variable), values)
            variable.assign(values)
        if has_changed:
            warnings.warn(
                "The encoders have other weights than at the start of the run in "
                f"{self.folder}. They get the weights of the run.",
                stacklevel=4,
            )


class _Duration(keras.callbacks.Callback):
    """Says how many steps a stage has, and after the first ones how long it takes."""

    # Keras need not wait for each step; see `TrainingRun`.
    async_safe = True

    def __init__(self, run, stage):
        super().__init__()
        self.run, self.stage, self.steps = run, stage.capitalize(), 0

    def on_train_begin(self, logs=None):
        epochs, steps = self.params["epochs"], self.params["steps"]
        self.run.say(f"{self.stage}: {epochs} x {steps} steps.")

    def on_epoch_begin(self, epoch, logs=None):
        self.left = (self.params["epochs"] - epoch) * self.params["steps"]

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        # The first step compiles functions.
        if self.steps == 2:
            self.start = time.perf_counter()
        elif self.steps == 7:
            seconds = (time.perf_counter() - self.start) / 5 * (self.left - batch - 1)
            minutes = math.ceil(seconds / 60)
            left = f"{minutes} min" if minutes > 1 else f"{math.ceil(seconds)} s"
            self.run.say(f"{self.stage}: about {left} left.")
