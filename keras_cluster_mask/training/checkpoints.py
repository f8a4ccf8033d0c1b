"""Checkpoints of a training run: a callback writes them, and `fit` resumes from them.

A checkpoint is one file of NumPy, such as `epoch-00042.npz`. It holds the values of all
variables and, as JSON, the progress of the run and what its model and data must be.
"""

import json
import math
import os
import re
import zipfile
from typing import Any

import keras
import numpy as np

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.processes import (
    all_gather_object,
    to_numpy,
)
from keras_cluster_mask.distribution.replicas import is_main_process
from keras_cluster_mask.training.layers import differences, settings_of
from keras_cluster_mask.training.model_tokenizer import identity_of
from keras_cluster_mask.training.optimizers import (
    build,
    inner_optimizer,
    learning_rates,
    optimizer_parts,
)

# Arguments that may be others when a run is resumed: Keras numbers names, which weights
# are trained is compared for each, and another micro-batch gives the same result.
MAY_CHANGE = "name", "trainable", "micro_batch_size"


class RunCallback(keras.callbacks.Callback):
    """A callback for the `fit` of a `ContrastiveModel`.

    Attributes:
        run: `TrainingRun`, which `fit` sets until it ends: a run holds the data.
    """

    run = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self.run is None:
            raise ValueError(
                f"`{type(self).__name__}` must be in the `callbacks` of the `fit` of a "
                f"`ContrastiveModel`. Received: `fit` of a {type(self.model).__name__}"
            )

    def _is_due(self, epoch: int, every: int) -> bool:
        """Returns whether an epoch is the last or one of every so many epochs."""
        is_last = epoch + 1 == self.params["epochs"] or self.model.stop_training
        return is_last or (epoch + 1) % every == 0


class Checkpoint(RunCallback):
    """Saves the whole state of a training run, for `fit(..., resume_from=directory)`.

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
    workers or processes. Its samples, seed and options must not change, and its files
    may be copied. Of arrays, the texts, the weights and at least 32 images are
    compared. For other kinds of data, each epoch is a pass over the data. The state of
    other callbacks is not saved. An epoch that a callback stops early is not saved
    either.

    A NaN or infinite loss of an epoch stops the run with an error that reports the last
    checkpoint, and the epoch is not saved. To stop at the first such step, also pass
    `keras.callbacks.TerminateOnNaN(raise_error=True)`, which waits for each step.
    Weights are not checked: if the last step of an epoch made them infinite, resume
    from the checkpoint before.

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
            resumes from, if the data cannot be resumed, or if the loss is NaN or
            infinite.
        OSError: From `fit`, if a file cannot be written.
    """

    def __init__(
        self, directory: str | os.PathLike, save_every: int = 1, keep: int = 3
    ):
        # Imported when used, since it needs packages that Keras does not.
        from keras_cluster_mask.data.files import file_system

        super().__init__()
        self.folder = os.fspath(directory).rstrip("/")
        self.save_every = check_integer("save_every", save_every)
        self.keep = check_integer("keep", keep)
        file_system(self.folder, "directory")

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        run = self.run
        _check_resumable(run.data)
        if any(getattr(x, "swap_on_epoch", False) for x in run.callbacks):
            raise ValueError(
                "`callbacks` must not contain a `Checkpoint` together with "
                "`SwapEMAWeights(swap_on_epoch=True)`, which swaps the weights for "
                "averages while checkpoints are saved: pass `swap_on_epoch=False`. "
                "Received: callbacks of types "
                f"{[type(x).__name__ for x in run.callbacks]}"
            )
        # All processes raise the error, even if some do not see the file.
        last = max(all_gather_object(max(saved_epochs(self.folder), default=-1)))
        if last > run.epoch:
            raise ValueError(
                "`directory` must not contain checkpoints after the epoch at which "
                "this run starts: pass `resume_from=directory` to `fit`, or use "
                f"another directory. Received: directory={self.folder}, with a "
                f"checkpoint after epoch {last}, and a run that starts after epoch "
                f"{run.epoch}"
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._is_due(epoch, self.save_every) or self.run.is_partial:
            return
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            *_, last = "none", *saved_epochs(self.folder).values()
            raise ValueError(
                "The loss must be finite when a checkpoint is saved: resume from the "
                f"last checkpoint, which is {last}, with a lower learning rate, a "
                "longer warm-up or gradient clipping. "
                "`keras.callbacks.TerminateOnNaN(raise_error=True)` stops at the first "
                f"such step. Received: loss={loss} in epoch {epoch + 1}"
            )
        # In all processes, since the weights may be sharded over them.
        arrays = [to_numpy(variable) for variable in _variables(self.model)]
        if not is_main_process():
            return
        from keras_cluster_mask.data.files import remove, replacing

        run = self.run
        facts = {
            "epoch": run.epoch,
            "history": run.history,
            "data_origin": run.data.origin,
            "learning_rates": [run.first_rates, learning_rates(self.model)],
            "description": describe_run(self.model, run.data),
        }
        content = np.array(json.dumps(facts, default=float))
        path = f"{self.folder}/epoch-{run.epoch:05}.npz"
        # A reader finds the whole file or none, even if this process is killed.
        with replacing(path) as file:
            np.savez(file, *arrays, facts=content, **run.rng_state)
        # A killed process leaves an incomplete file behind.
        parts = _list_files(self.folder, r"\..*\.part")
        # The oldest ones beyond `keep` are deleted, too.
        paths = [*saved_epochs(self.folder).values()]
        for old in [*paths[: -self.keep], *parts]:
            remove(old)


def resume(run, model, path, verbose):
    """Moves a run to a checkpoint, the same one in all processes, if there is one.

    Args:
        run: `TrainingRun`.
        model: A `ContrastiveModel`.
        path: Path or URL of a checkpoint, which must exist, or of a folder.
        verbose: Whether to print where the run starts.
    """
    from keras_cluster_mask.data.files import file_system

    path = os.fspath(path).rstrip("/")
    file_system(path, "resume_from")
    paths = [path] if path.endswith(".npz") else [*saved_epochs(path).values()]
    if not paths and path.endswith((".keras", ".h5")):
        raise ValueError(
            "`resume_from` must be the folder of a `kcm.callbacks.Checkpoint`, or one "
            f"of its .npz files. Received: resume_from={path}"
        )
    arrays, facts = _read_checkpoint(paths[-1]) if paths else ({}, {"epoch": -1})
    epochs = all_gather_object(facts["epoch"])
    if len({*epochs}) > 1:
        raise ValueError(
            "`resume_from` must be a folder that all processes can read. Received: "
            f"resume_from={path}, last epochs {epochs} by process"
        )
    if not paths:
        if verbose:
            print(f"No checkpoint in {path}: starting from scratch.")
        return
    path = paths[-1]
    if not model.built or not model.compiled:
        raise ValueError(
            "`resume_from` needs a compiled and built model: compile it with an "
            "optimizer, and call it on a batch. "
            f"Received: built={model.built}, compiled={model.compiled}"
        )
    _check_resumable(run.data)
    build(model)
    differing = [*differences(facts["description"], describe_run(model, run.data))]
    if differing:
        raise ValueError(
            "`resume_from` must be a checkpoint of the same model and data. Use "
            "another folder, or restore the model and data. Received: "
            f"resume_from={path}, {len(differing)} differences, with "
            + "; ".join(differing[:10])
        )
    for index, variable in enumerate(_variables(model)):
        variable.assign(arrays[f"arr_{index}"])
    run.first_rates = learning_rates(model)
    parts = optimizer_parts(model.optimizer)
    for index, (first, last) in enumerate(zip(*facts["learning_rates"])):
        # A rate that the user changed after the saved run is kept. If that run was in
        # this process, the rate still has the value that a callback gave it.
        if last is not None and run.first_rates[index] in (first, last):
            parts[index].learning_rate = last
            run.first_rates[index] = first
    run.rng_state = {k: v for k, v in arrays.items() if k.startswith("generators/")}
    run.epoch, run.history = facts["epoch"], facts["history"]
    run.data.origin = facts["data_origin"]
    if verbose:
        print(f"Resuming from {path}, after epoch {run.epoch}.")


def saved_epochs(folder) -> dict[int, str]:
    """Returns the paths of the checkpoints in a folder by their numbers of epochs."""
    paths = _list_files(folder, r"epoch-\d+\.npz")
    found = {int(path.rpartition("-")[2].removesuffix(".npz")): path for path in paths}
    return dict(sorted(found.items()))


# === What a checkpoint holds ===


def _variables(model):
    """Lists the variables of a model and its optimizer, except learning rates.

    Whether a learning rate is a variable may change: a schedule may replace a number.
    """
    rates = {id(part.learning_rate) for part in optimizer_parts(model.optimizer)}
    variables = *model.variables, *model.optimizer.variables
    return [v for v in variables if id(v) not in rates]


def describe_run(model, data):
    """Returns what must be the same when a run is resumed, as JSON values."""
    optimizers = inner_optimizer(model.optimizer), *optimizer_parts(model.optimizer)
    trained = {id(v) for v in model.trainable_variables}
    content = {
        "data": data.description,
        "optimizer": [type(x).__name__ for x in optimizers],
        **describe_model(model),
        # Last, as there may be hundreds of differences.
        "variables": [
            f"{v.dtype} {tuple(v.shape)}" + ", trained" * (id(v) in trained)
            for v in _variables(model)
        ],
    }
    return json.loads(json.dumps(content, default=float))


def describe_model(model):
    """Returns the settings of a model, without its variables, as JSON values."""
    options, head = (
        # Dictionaries are layers.
        {k: v for k, v in x.items() if k not in MAY_CHANGE and not isinstance(v, dict)}
        for x in (model.get_config(), model.head.get_config())
    )
    # Without a backbone, the image tower has these options.
    tower = model.image_tower
    options |= {"pixel_mean": tower.pixel_mean, "pixel_std": tower.pixel_std}
    return {
        "tokenizer": identity_of(model.tokenizer),
        "model": options,
        "head": head,
        "maskings": [
            {"class": type(x).__name__, **x.settings()} for x in model.maskings
        ],
        "layers": settings_of(model),
    }


def _check_resumable(data):
    """Raises an error for data that cannot be read from the start of an epoch."""
    if data.steps_per_epoch is not None and data.spec is None:
        raise ValueError(
            "`steps_per_epoch` with checkpoints needs data that can start at any "
            "batch: pass an `image_text_dataset` or a `tf.data.Dataset`. Received: "
            f"steps_per_epoch={data.steps_per_epoch}, data of type {data.type_name}"
        )


# === Files ===


def _list_files(folder, pattern):
    """Returns the sorted paths of the files with names that match a pattern."""
    from keras_cluster_mask.data.files import file_system

    system, found = file_system(folder)
    # Clients of object stores cache listings.
    system.invalidate_cache(found)
    try:
        found = system.ls(found, detail=False)
    except FileNotFoundError:
        return []
    names = sorted(path.rpartition("/")[2] for path in found)
    return [f"{folder}/{name}" for name in names if re.fullmatch(pattern, name)]


def _read_checkpoint(path):
    """Returns the arrays and the facts of a checkpoint."""
    from keras_cluster_mask.data.files import open_file

    try:
        with (
            open_file(path) as content,
            np.load(content, allow_pickle=False) as file,
        ):
            arrays = dict(file)
        return arrays, json.loads(str(arrays.pop("facts")))
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            "`resume_from` must be an intact checkpoint: remove this file to resume "
            f"from the previous checkpoint. Received: {path}, which raised: {error}"
        ) from error
