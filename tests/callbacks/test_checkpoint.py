"""A run that was interrupted and resumed ends as if it had not been."""

import errno
import os
import random
import signal
import subprocess
import sys

import fsspec
import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.training.checkpoints import saved_epochs
from tests.helpers import (
    MASKINGS,
    assert_close,
    assert_same_values,
    compiled_model,
    random_pairs,
    run_program,
)

from .training_run import (
    PROGRAM,
    StopAfter,
    make_dataset,
    make_model,
    pairs,
    weights_of,
)

pytest.importorskip("tensorflow")

BACKEND = keras.backend.backend()
STEPS = 9  # Three epochs of 27 samples in batches of 8: 3 each.


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_pairs_to):
    folder = tmp_path_factory.mktemp("shards")
    return [
        write_pairs_to(folder / "a.tar", 0, 16),
        write_pairs_to(folder / "b.tar", 16, 11),
    ]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The weights and the history of a run that nothing interrupts."""
    return run(make_dataset(shards), tmp_path_factory.mktemp("whole"))


def run(data, folder, stop=None, model=None, fit=None, **options):
    model = model or make_model()
    callbacks = [kcm.callbacks.Checkpoint(folder, **options)]
    if stop:
        callbacks.append(StopAfter(stop))
    fit = {"epochs": 3, "verbose": 0, "resume_from": folder, **(fit or {})}
    try:
        history = model.fit(data, callbacks=callbacks, **fit)
    except KeyboardInterrupt:
        history = None
    return weights_of(model), history


def epochs_saved(folder):
    return [*saved_epochs(folder)]


# === Resuming ===


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize("stop", [5, 1, 6, STEPS])
def test_a_run_that_was_stopped_ends_where_one_that_was_not_does(
    stop, whole, shards, tmp_path
):
    # In a later epoch, in the first, at the last step of one and of all; with dropout,
    # a moving threshold, a learning rate schedule and averages.
    expected, history = whole
    assert history.epoch == [0, 1, 2]
    assert all(np.isfinite(history.history["loss"]))
    run(make_dataset(shards), tmp_path, stop)
    # And a run that is finished gives its weights and history again.
    for _ in range(2):
        found, resumed = run(make_dataset(shards), tmp_path)
        assert_same_values(found, expected)
        assert resumed.epoch == [0, 1, 2]
        assert resumed.history == history.history
    _, longer = run(make_dataset(shards), tmp_path, fit={"epochs": 4})
    assert longer.epoch == [0, 1, 2, 3]


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({"num_workers": 2}, {"num_workers": 0}, marks=pytest.mark.slow),
        pytest.param({"num_workers": 0}, {"num_workers": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_with_other_workers(before, after, whole, shards, tmp_path):
    expected, history = whole
    run(make_dataset(shards, **before), tmp_path, stop=5)
    found, resumed = run(make_dataset(shards, **after), tmp_path)
    assert_same_values(found, expected)
    assert resumed.history == history.history


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize("kind", ["stream", "dataset"])
def test_epochs_of_so_many_steps_continue_through_the_data(kind, shards, tmp_path):
    import tensorflow as tf

    def data():
        if kind == "stream":
            return make_dataset(shards)
        return tf.data.Dataset.from_tensor_slices(pairs()).batch(4).repeat()

    fit = {"steps_per_epoch": 4, "epochs": 3}  # 12 steps: 4 times the data.
    model = make_model()
    _, history = run(data(), tmp_path / "whole", model=model, fit=fit)
    assert int(model.optimizer.iterations.numpy()) == 12
    expected = weights_of(model)
    run(data(), tmp_path / "stopped", stop=7, fit=fit)
    found, resumed = run(data(), tmp_path / "stopped", fit=fit)
    assert_same_values(found, expected)
    assert resumed.history == history.history
    with pytest.raises(ValueError, match=r"data\.steps_per_epoch: 4 in the checkpoint"):
        run(data(), tmp_path / "whole", fit={"steps_per_epoch": 5})


@pytest.mark.any_backend
def test_samples_that_do_not_decode_do_not_shift_what_is_left(write_pairs, tmp_path):
    broken = [("bad.png", b"no image"), ("bad.txt", b"bad")]
    shard = write_pairs("a.tar", 0, 40, broken=broken)
    with pytest.warns(UserWarning, match="does not decode"):
        expected, _, found = (
            run(make_dataset(shard, max_skipped=0.5), tmp_path / folder, stop)[0]
            for folder, stop in (("whole", None), ("stopped", 7), ("stopped", None))
        )
    assert_same_values(found, expected)


def unknown_length():
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(pairs()).batch(4, drop_remainder=True)
    return data.filter(lambda batch: True)


ARRAYS = {"shuffle": False, "batch_size": 4}
SPLIT = {**ARRAYS, "validation_data": None, "validation_split": 0.2}


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (pairs, ARRAYS),
        (unknown_length, {}),
        pytest.param(lambda: pairs(15), SPLIT, marks=pytest.mark.slow),
    ],
)
def test_arrays_and_other_datasets_resume_with_an_epoch(make, options, tmp_path):
    validation = {"validation_data": pairs(8, seed=1), "validation_batch_size": 4}
    data, fit = make(), {**validation, **options}
    expected, history = run(data, tmp_path / "whole", fit=fit)
    for stop in (5, 6):
        folder = tmp_path / f"stopped-{stop}"
        run(data, folder, stop, fit=fit)
        found, resumed = run(data, folder, fit=fit)
        assert_same_values(found, expected)
        assert_close(resumed.history, history.history, atol=0.0, rtol=1e-6)


@pytest.mark.any_backend
@pytest.mark.slow
def test_a_masking_with_a_teacher_resumes(tmp_path):
    def run_until(stop, folder):
        keras.utils.set_random_seed(1)
        model = make_model(MASKINGS["attentive"](seed=3))
        fit = {"shuffle": False, "batch_size": 4}
        return run(pairs(), tmp_path / folder, stop, model, fit)[0]

    expected = run_until(None, "whole")
    run_until(5, "stopped")
    assert_same_values(run_until(None, "stopped"), expected)


# === What is saved ===


class StopBefore(keras.callbacks.Callback):
    """Stops training as a time limit does, before a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_begin(self, batch, logs=None):
        if int(ops.convert_to_numpy(self.model.optimizer.iterations)) == self.step:
            self.model.stop_training = True


@pytest.mark.any_backend
@pytest.mark.parametrize(
    # Before the second step of the second epoch, and before the last of the first.
    ("step", "save_every", "epochs"),
    [(4, 1, [0, 1]), (2, 5, [0])],
)
def test_an_epoch_that_a_callback_stops_is_saved_if_it_has_ended(
    step, save_every, epochs, whole, shards, tmp_path
):
    checkpoint = kcm.callbacks.Checkpoint(tmp_path, save_every)
    fit = dict(epochs=3, verbose=0, callbacks=[checkpoint, StopBefore(step)])
    assert make_model().fit(make_dataset(shards), **fit).epoch == epochs
    assert epochs_saved(tmp_path) == [1]
    found, history = run(make_dataset(shards), tmp_path)
    assert_same_values(found, whole[0])
    assert history.history == whole[1].history


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("save_every", "keep", "expected"),
    [(1, 2, [4, 5]), (1, 9, [1, 2, 3, 4, 5]), (2, 9, [2, 4, 5]), (9, 1, [5])],
)
def test_every_so_many_epochs_and_the_last_are_saved(
    save_every, keep, expected, tmp_path
):
    options = dict(save_every=save_every, keep=keep, model=compiled_model())
    run(random_pairs(8), tmp_path, fit={"epochs": 5, "batch_size": 4}, **options)
    assert epochs_saved(tmp_path) == expected


@pytest.mark.skipif(BACKEND != "jax", reason="The state of a model is apart on JAX.")
def test_the_state_of_the_model_is_left_alone_between_saves(tmp_path, monkeypatch):
    count, seen = CountSteps(), []

    class Model(kcm.ContrastiveModel):
        def jax_state_sync(self):
            seen.append(count.begun)
            super().jax_state_sync()

    monkeypatch.setattr(kcm, "ContrastiveModel", Model)
    long_run(tmp_path, callbacks=[count, kcm.callbacks.Throughput()])
    # A batch has begun when the steps before it are checked.
    assert {*seen} == {0, 101, 130}


# === Killed ===


@pytest.mark.any_backend
@pytest.mark.slow
def test_killed_at_random_points_and_while_saving(shards, tmp_path):
    rng = random.Random(os.getpid())
    command, folder = (PROGRAM, shards[0].parent / "*.tar"), tmp_path / "killed"
    kills = 0
    for syncs in (None, 2, 3):
        # A save calls fsync for the file before it is renamed.
        environment = {"KILL_AT_SYNC": str(syncs)} if syncs else {}
        process = subprocess.Popen(
            [sys.executable, *command, folder, tmp_path / "killed.npz"],
            env={**os.environ, "KERAS_BACKEND": BACKEND, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if syncs is None:
            for _ in range(rng.randint(1, 4)):
                process.stdout.readline()
            process.kill()
        process.communicate(timeout=600)
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    for name in ("killed", "whole"):
        run_program(*command, tmp_path / name, tmp_path / f"{name}.npz")
    with (
        np.load(tmp_path / "whole.npz") as whole,
        np.load(tmp_path / "killed.npz") as killed,
    ):
        assert_same_values(killed.values(), whole.values())
    assert not list(folder.glob(".*"))


# === Files ===


@pytest.mark.any_backend
def test_a_folder_on_remote_storage_is_written_and_resumed_from(whole, shards):
    memory = fsspec.filesystem("memory")
    expected, history = whole
    folder = "memory://checkpoints/a run"
    run(make_dataset(shards), folder, stop=7, keep=2)
    assert saved_epochs(folder)[2] == f"{folder}/epoch-00002.npz"
    # What a process that was killed has left.
    memory.pipe("/checkpoints/a run/.epoch-00003.npz.1.part", b"a part")
    found, resumed = run(make_dataset(shards), folder, keep=2)
    assert_same_values(found, expected)
    assert resumed.history == history.history
    names = [path.rpartition("/")[2] for path in memory.ls("/checkpoints/a run", False)]
    assert sorted(names) == ["epoch-00002.npz", "epoch-00003.npz"]
    with pytest.raises(FileNotFoundError, match=r"a run/epoch-1\.npz"):
        run(make_dataset(shards), folder, fit={"resume_from": f"{folder}/epoch-1.npz"})


@pytest.mark.any_backend
def test_an_error_of_writing_stops_training(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = compiled_model()
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space left"):
        run(random_pairs(8), tmp_path, model=model)
    assert int(model.optimizer.iterations) == 1


# === Losses and weights that are not finite ===


class CountSteps(keras.callbacks.Callback):
    begun = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.begun = batch + 1


def long_run(folder, bad=None, callbacks=()):
    """An epoch of 130 steps, with an image that is not finite in one of them."""
    data = random_pairs(260)
    data["images"] = data["images"] / np.float32(64) - 2
    if bad is not None:
        data["images"][2 * bad] = np.nan
    checkpoint = kcm.callbacks.Checkpoint(folder)
    fit = dict(batch_size=2, shuffle=False, verbose=0)
    compiled_model().fit(data, callbacks=[*callbacks, checkpoint], **fit)


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize(
    ("bad", "stops_before", "steps"),
    # 100 steps after the last look, and at the end of the epoch.
    [
        (3, 101, "step 1 and step 100"),
        (99, 101, "step 1 and step 100"),
        (100, 130, "step 101 and the end"),
        (129, 130, "step 101 and the end"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(bad, stops_before, steps, tmp_path):
    count = CountSteps()
    with pytest.raises(
        kcm.callbacks.NonFiniteError,
        match=rf"is none. Received: loss=nan between {steps} of epoch 1$",
    ):
        long_run(tmp_path, bad, [count])
    assert count.begun <= stops_before
    assert not epochs_saved(tmp_path)


@pytest.mark.any_backend
def test_the_last_good_checkpoint_is_named_and_remains_the_last(tmp_path):
    fit = {"batch_size": 4, "epochs": 2}
    run(random_pairs(8), tmp_path, model=compiled_model(), fit=fit)
    model = compiled_model(keras.optimizers.SGD(np.inf))
    with pytest.raises(
        kcm.callbacks.NonFiniteError,
        match=r"epoch-00002\.npz\. Received: loss=nan between .* of epoch 3$",
    ):
        run(random_pairs(8), tmp_path, model=model, fit={**fit, "epochs": 3})
    assert epochs_saved(tmp_path) == [1, 2]


class BreakMoment(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        moment = self.model.optimizer.variables[-1]
        moment.assign(np.full(moment.shape, np.inf))


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("optimizer", "callbacks", "found"),
    [
        (lambda: keras.optimizers.SGD(1e38), [], ""),
        (lambda: "adam", [BreakMoment()], r"adam\w*/"),
    ],
)
def test_weights_and_moments_that_are_infinite_are_not_saved(
    optimizer, callbacks, found, tmp_path
):
    model = make_model(optimizer=optimizer())
    callbacks = [*callbacks, kcm.callbacks.Checkpoint(tmp_path)]
    with pytest.raises(
        kcm.callbacks.NonFiniteError,
        match=rf"weights.*is none.*Received: {found}.* at the end of epoch 1$",
    ):
        model.fit(pairs(), batch_size=12, verbose=0, callbacks=callbacks)
    assert not epochs_saved(tmp_path)


@pytest.mark.any_backend
def test_all_processes_stop_at_weights_that_are_infinite_in_one(tmp_path, monkeypatch):
    module = sys.modules[kcm.callbacks.Checkpoint.__module__]

    def gather(value):
        # -1 is of a folder without checkpoints.
        return [value, value if value < 0 else 1]

    monkeypatch.setattr(module, "all_gather_object", gather)
    with pytest.raises(kcm.callbacks.NonFiniteError):
        run(pairs(), tmp_path)


# === Refusals ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("save_every", 0),
        ("save_every", "epoch"),
        ("keep", 0),
        ("directory", "nowhere://run"),
    ],
)
def test_bad_arguments_are_named(argument, value, tmp_path):
    with pytest.raises(ValueError, match=rf"`{argument}`.*Received: {argument}="):
        kcm.callbacks.Checkpoint(**{"directory": tmp_path, argument: value})


@pytest.mark.any_backend
def test_an_epoch_of_data_that_is_not_found_again_is_refused(tmp_path):
    data = ((x,) for x in [pairs()])
    with pytest.raises(ValueError, match=r"Received: steps_per_epoch=2, data of"):
        run(data, tmp_path, fit={"steps_per_epoch": 2})
