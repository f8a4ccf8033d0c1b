"""Several calls of `fit` as one run, which resumes in the stage where it stopped."""

import json
import math
import pathlib
import time

import keras
import numpy as np

from keras_cluster_mask.distribution.backends import print_backend
from keras_cluster_mask.distribution.processes import to_numpy
from keras_cluster_mask.distribution.replicas import verbosity
from keras_cluster_mask.training.checkpoints import Checkpoint, describe_model
from keras_cluster_mask.training.layers import differences


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
        self.folder = None if folder is None else pathlib.Path(folder).expanduser()
        self.history, self._epochs = keras.callbacks.History(), []
        if folder is not None:
            shapes = [str(tuple(variable.shape)) for variable in model.variables]
            self._start({**settings, **describe_model(model), "variables": shapes})

    def say(self, line):
        if self.verbose:
            print(line, flush=True)

    def fit(self, stage, data, epochs, callbacks=(), save_every=1, **options):
        """Trains a stage, or the rest of an interrupted stage."""
        duration = _Duration(self, stage)
        callbacks = [*callbacks, duration]
        if self.folder is not None:
            folder = self.folder / stage
            callbacks.append(Checkpoint(folder, save_every, keep=1))
            if folder.exists():
                options["resume_from"] = folder
        options = {"callbacks": callbacks, "verbose": self.verbose, **options}
        found = self.model.fit(data, epochs=epochs, **options)
        if not duration.steps:
            self.say(f"{duration.stage}: already finished.")
        self._epochs += [
            {"stage": stage, **dict(zip(found.history, values))}
            for values in zip(*found.history.values())
        ]
        names = dict.fromkeys(name for epoch in self._epochs for name in epoch)
        self.history.epoch = [*range(len(self._epochs))]
        self.history.history = {
            name: [epoch.get(name) for epoch in self._epochs] for name in names
        }

    def _start(self, settings):
        """Saves what the run starts from; or compares it, and restores the weights."""
        # Imported here: it needs packages that Keras does not.
        from keras_cluster_mask.data.files import replacing

        path, variables = self.folder / "start.npz", self.model.variables
        if not path.exists():
            content = np.array(json.dumps(settings, default=float))
            with replacing(path) as file:
                np.savez(file, *map(to_numpy, variables), settings=content)
        with np.load(path) as file:
            found = dict(file)
        then = json.loads(str(found["settings"]))
        if differing := [*differences(then, settings)]:
            raise ValueError(
                "`folder` must be from the same run: pass another folder, or the same "
                f"model, data and settings. Received: folder={self.folder}, with "
                + "; ".join(differing[:10])
            )
        for index, variable in enumerate(variables):
            variable.assign(found[f"arr_{index}"])


class _Duration(keras.callbacks.Callback):
    """Says how many steps a stage has, and after the first ones how long it takes."""

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
