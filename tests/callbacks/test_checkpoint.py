"""A run that was interrupted and resumed ends as if it had not been."""

import errno
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import warnings

import fsspec
import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.training.checkpoints import (
    CheckpointFiles,
    read_checkpoint,
    read_resumable,
)
from keras_cluster_mask.training.run_state import describe
from tests.helpers import (
    FAST,
    MASKINGS,
    image_mlp,
    masked_vit,
    random_pairs,
    text_bag,
    tiny_clip,
    values,
)

from .training_run import make_dataset, make_model, weights_of

pytest.importorskip("tensorflow")

BACKEND = keras.backend.backend()
STEPS = 9  # Three epochs of 27 samples in batches of 8: 3 each.
PROGRAM = pathlib.Path(__file__).with_name("training_run.py")


class StopAfter(keras.callbacks.Callback):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_train_batch_end(self, batch, logs=None):
        self.steps -= 1
        if self.steps == 0:
            raise KeyboardInterrupt


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
    options = {"save_every": 2, "monitor": None, **options}
    callbacks = [kcm.callbacks.Checkpoint(folder, **options)]
    if stop:
        callbacks.append(StopAfter(stop))
    fit = {"epochs": 3, "verbose": 0, "resume_from": folder, **(fit or {})}
    try:
        history = model.fit(data, callbacks=callbacks, **fit)
    except KeyboardInterrupt:
        history = None
    return weights_of(model), history


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def pairs(count=12, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 300, size=(count, 9)).astype("int32")
    images = rng.integers(0, 256, size=(count, 16, 16, 3)).astype("uint8")
    return {"images": images, "token_ids": ids}


# === Resuming ===


def test_a_run_that_was_stopped_ends_where_one_that_was_not_does(
    whole, shards, tmp_path
):
    # Before the first save, within an epoch, at the last step of one, which is saved,
    # and of all; with dropout, a moving threshold, a learning rate schedule and
    # averages.
    expected, history = whole
    assert history.epoch == [0, 1, 2]
    assert all(np.isfinite(history.history["loss"]))
    for stop in (1, 5, 6, STEPS):
        folder = tmp_path / f"stopped-{stop}"
        run(make_dataset(shards), folder, stop)
        found, resumed = run(make_dataset(shards), folder)
        assert_same_weights(found, expected)
        assert resumed.epoch == [0, 1, 2]
        assert resumed.history == history.history


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"format": "grain"}, {"format": "tf"}),
        ({"format": "tf"}, {"format": "grain"}),
        pytest.param({"num_workers": 2}, {"num_workers": 0}, marks=pytest.mark.slow),
        pytest.param({"num_workers": 0}, {"num_workers": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_in_another_format_and_with_other_workers(
    before, after, whole, shards, tmp_path
):
    expected, history = whole
    run(make_dataset(shards, **before), tmp_path, stop=5)
    found, resumed = run(make_dataset(shards, **after), tmp_path)
    assert_same_weights(found, expected)
    assert resumed.history == history.history


def test_a_run_stopped_again_and_again_ends_the_same(whole, shards, tmp_path):
    expected, _ = whole
    for _ in range(3):
        run(make_dataset(shards), tmp_path / "stopped", stop=3)
    found, _ = run(make_dataset(shards), tmp_path / "stopped")
    assert_same_weights(found, expected)


@pytest.mark.slow
def test_the_norm_of_gradients_resumes_and_may_be_switched(shards, tmp_path):
    def make(log):
        # Not Adam, which makes steps of rounding where there is no gradient.
        return make_model(
            optimizer=keras.optimizers.SGD(0.05, momentum=0.9),
            log_gradient_norm=log,
            learning_rate_multipliers={"image": 0.5, "text": 2.0},
        )

    whole, expected = run(make_dataset(shards), tmp_path / "a", model=make(True))
    for before, after in ((True, True), (False, True), (True, False)):
        folder = tmp_path / f"{before}-{after}"
        histories = []
        for log, stop in ((before, 5), (after, None)):
            found, history = run(make_dataset(shards), folder, stop, make(log))
            histories.append(history)
        # The second epoch was interrupted.
        norms = histories[1].history.get("gradient_norm", [])
        assert len(norms) == {(1, 1): 3, (0, 1): 2, (1, 0): 1}[before, after]
        if before and after:
            assert norms == expected.history["gradient_norm"]
        # XLA makes two programs of steps with and without the norm, and may round
        # differently in them.
        exact = before == after or keras.backend.backend() != "jax"
        if exact:
            assert_same_weights(found, whole)
        for key, value in whole.items():
            np.testing.assert_allclose(found[key], value, atol=1e-6, err_msg=key)
        if after:
            last = expected.history["gradient_norm"][-1]
            assert norms[-1] == (last if exact else pytest.approx(last, rel=1e-5))


def test_gradient_checkpointing_may_start_at_a_checkpoint(whole, shards, tmp_path):
    run(make_dataset(shards), tmp_path / "b", stop=5)
    model = make_model()
    model.gradient_checkpointing = ["tokens"]
    found, _ = run(make_dataset(shards), tmp_path / "b", model=model)
    for key, value in whole[0].items():
        np.testing.assert_allclose(found[key], value, atol=1e-5, err_msg=key)


@pytest.mark.any_backend
def test_a_finished_run_gives_its_weights_and_history_again(shards, tmp_path):
    expected, history = run(make_dataset(shards), tmp_path)
    found, again = run(make_dataset(shards), tmp_path)
    assert again.history == history.history
    assert_same_weights(found, expected)
    _, longer = run(make_dataset(shards), tmp_path, fit={"epochs": 4})
    assert longer.epoch == [0, 1, 2, 3]


@pytest.mark.slow
def test_epochs_of_so_many_steps_continue_through_the_data(shards, tmp_path):
    fit = {"steps_per_epoch": 4, "epochs": 3}  # 12 steps: nearly 4 times the data.
    model = make_model()
    _, history = run(make_dataset(shards), tmp_path / "whole", model=model, fit=fit)
    assert int(model.optimizer.iterations.numpy()) == 12
    expected = weights_of(model)
    for stop in (4, 7):
        folder = tmp_path / f"stopped-{stop}"
        run(make_dataset(shards), folder, stop, fit=fit)
        found, resumed = run(make_dataset(shards), folder, fit=fit)
        assert_same_weights(found, expected)
        assert resumed.history == history.history
    with pytest.raises(ValueError, match=r"data\.steps_per_epoch: 4 in the checkpoint"):
        run(make_dataset(shards), tmp_path / "whole", fit={"steps_per_epoch": 5})


@pytest.mark.any_backend
def test_samples_that_do_not_decode_do_not_shift_what_is_left(write_pairs, tmp_path):
    broken = [("bad.png", b"no image"), ("bad.txt", b"bad")]
    shard = write_pairs("a.tar", 0, 40, broken=broken)
    with pytest.warns(UserWarning, match="does not decode"):
        expected, _ = run(make_dataset(shard), tmp_path / "whole")
    with pytest.warns(UserWarning, match="does not decode"):
        run(make_dataset(shard), tmp_path / "stopped", stop=7)
    with pytest.warns(UserWarning, match="does not decode"):
        found, _ = run(make_dataset(shard), tmp_path / "stopped")
    assert_same_weights(found, expected)


def several_views(views=2):
    keras.utils.set_random_seed(1)
    model = kcm.ContrastiveModel.from_backbone(
        tiny_clip(), masking=kcm.RandomMasking(0.5, seed=3), views=views
    )
    model.compile(keras.optimizers.SGD(0.1), **FAST)
    return model


@pytest.mark.parametrize("kind", ["arrays", "dataset", "two views"])
def test_arrays_in_order_and_other_datasets_resume_too(kind, tmp_path):
    import tensorflow as tf

    data, fit, make = pairs(), {"shuffle": False, "batch_size": 4}, make_model
    if kind == "dataset":
        data, fit = tf.data.Dataset.from_tensor_slices(data).batch(4), {}
    if kind == "two views":
        data, make = random_pairs(12), several_views
    expected, _ = run(data, tmp_path / "whole", model=make(), fit=fit)
    for stop in (5, 6):
        run(data, tmp_path / f"stopped-{stop}", stop, make(), fit=fit)
        found, _ = run(data, tmp_path / f"stopped-{stop}", model=make(), fit=fit)
        assert_same_weights(found, expected)


class StopWithin(keras.callbacks.Callback):
    """Stops training as a time limit does, before a step."""

    def on_train_batch_begin(self, batch, logs=None):
        if int(ops.convert_to_numpy(self.model.optimizer.iterations)) == 4:
            self.model.stop_training = True


class Report(keras.callbacks.Callback):
    """A score that rises with each epoch."""

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = float(epoch)


@pytest.mark.any_backend
def test_an_epoch_that_a_callback_stops_is_not_the_best_yet(shards, tmp_path):
    checkpoint = kcm.callbacks.Checkpoint(tmp_path, monitor="score", mode="max")
    callbacks = [Report(), checkpoint, StopWithin()]
    make_model().fit(make_dataset(shards), epochs=2, verbose=0, callbacks=callbacks)
    _, facts = read_checkpoint(tmp_path / "best.npz")
    assert (facts["epoch"], facts["epoch_step"]) == (1, 0)


@pytest.mark.parametrize("validates", [False, True])
def test_an_epoch_that_a_callback_stops_continues_where_it_was(
    whole, shards, tmp_path, validates
):
    data, model = make_dataset(shards), make_model()
    checkpoint = kcm.callbacks.Checkpoint(tmp_path, monitor=None)
    validation_data = pairs() if validates else None
    history = model.fit(
        data,
        epochs=3,
        verbose=0,
        validation_data=validation_data,
        callbacks=[checkpoint, StopWithin()],
    )
    assert history.epoch == [0, 1]
    found, history = run(
        data, tmp_path, fit={"validation_data": validation_data}, model=make_model()
    )
    assert_same_weights(found, whole[0])
    assert history.epoch == [0, 1, 2]
    # Its report is of the rest alone.
    expected = whole[1].history["loss"]
    assert [x for x in history.history["loss"] if x not in expected] == [
        history.history["loss"][1]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("masking", ["threshold", "attentive"])
def test_maskings_with_a_state_of_their_own_resume(masking, tmp_path):
    def run_until(stop, folder):
        keras.utils.set_random_seed(1)
        made = MASKINGS[masking](num_prefix_tokens=0, seed=3)
        encoder = masked_vit(made) if masking == "attentive" else None
        model = make_model(made, masked_encoder=encoder)
        fit = {"shuffle": False, "batch_size": 4}
        return run(pairs(), tmp_path / folder, stop, model, fit)[0]

    expected = run_until(None, "whole")
    run_until(5, "stopped")
    assert_same_weights(run_until(None, "stopped"), expected)


@pytest.mark.slow
def test_the_held_out_part_of_arrays_stays_the_same(tmp_path):
    fit = {"shuffle": False, "batch_size": 4, "validation_split": 0.2}
    data = pairs(10)
    expected, history = run(data, tmp_path / "whole", fit=fit)
    for stop in (3, 4):
        run(data, tmp_path / f"stopped-{stop}", stop, save_every=1, fit=fit)
        found, resumed = run(data, tmp_path / f"stopped-{stop}", save_every=1, fit=fit)
        assert_same_weights(found, expected)
        assert resumed.history.keys() == history.history.keys()
        for name, logs in history.history.items():
            np.testing.assert_allclose(resumed.history[name], logs, rtol=1e-6)


def test_data_of_unknown_length_resumes_at_any_step_and_at_the_end(tmp_path):
    # Where its end is known only once the next step has begun, all the steps of an
    # epoch may be saved before its report.
    import tensorflow as tf

    class StopValidation(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            raise KeyboardInterrupt

    data = tf.data.Dataset.from_tensor_slices(pairs()).batch(4, drop_remainder=True)
    data = data.filter(lambda batch: True)
    fit = {"validation_data": pairs(8, seed=1), "validation_batch_size": 4}
    options = {"save_every": 1, "fit": fit}
    expected, history = run(data, tmp_path / "whole", **options)
    assert len(history.history["val_loss"]) == 3
    for stop in (StopAfter(2), StopValidation(), StopAfter(4)):
        folder = tmp_path / f"{type(stop).__name__}-{getattr(stop, 'steps', '')}"
        checkpoint = kcm.callbacks.Checkpoint(folder, save_every=1, monitor=None)
        callbacks = [checkpoint, stop]
        with pytest.raises(KeyboardInterrupt):
            make_model().fit(data, epochs=3, verbose=0, callbacks=callbacks, **fit)
        found, resumed = run(data, folder, **options)
        assert_same_weights(found, expected)
        assert resumed.epoch == history.epoch
        np.testing.assert_allclose(
            resumed.history["val_loss"], history.history["val_loss"], rtol=1e-6
        )


def test_a_run_killed_while_it_validates_validates_when_resumed(tmp_path):
    class StopValidation(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            raise KeyboardInterrupt

    fit = {"shuffle": False, "batch_size": 4, "validation_data": pairs(8, seed=1)}
    expected, history = run(pairs(), tmp_path / "whole", save_every=3, fit=fit)
    checkpoint = kcm.callbacks.Checkpoint(
        tmp_path / "stopped", save_every=3, monitor=None
    )
    callbacks = [checkpoint, StopValidation()]
    with pytest.raises(KeyboardInterrupt):
        make_model().fit(pairs(), epochs=3, verbose=0, callbacks=callbacks, **fit)
    found, resumed = run(pairs(), tmp_path / "stopped", save_every=3, fit=fit)
    assert_same_weights(found, expected)
    assert resumed.history.keys() == history.history.keys()
    for name, logs in history.history.items():
        np.testing.assert_allclose(resumed.history[name], logs, rtol=1e-6)


# === Killed ===


def start(shards, folder, weights, **environment):
    backend = keras.backend.backend()
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, (shards[0].parent / "*.tar", folder))]
        + [str(weights), "12"],
        env={**os.environ, "KERAS_BACKEND": backend, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


@pytest.mark.slow
def test_killed_at_random_points_and_while_saving(shards, tmp_path):
    finish(start(shards, tmp_path / "whole", tmp_path / "whole.npz"))
    rng = random.Random(os.getpid())
    folder = tmp_path / "killed"
    kills = 0
    for syncs in (None, 3, None, 4, None):
        # A save calls fsync for the file, and for the folder once it is renamed.
        environment = {"KILL_AT_SYNC": str(syncs)} if syncs else {}
        process = start(shards, folder, tmp_path / "killed.npz", **environment)
        if syncs is None:
            for _ in range(rng.randint(1, 4)):
                process.stdout.readline()
            process.kill()
        process.communicate(timeout=300)
        kills += process.returncode == -signal.SIGKILL
    assert kills == 5
    finish(start(shards, folder, tmp_path / "killed.npz"))
    with (
        np.load(tmp_path / "whole.npz") as whole,
        np.load(tmp_path / "killed.npz") as killed,
    ):
        assert_same_weights(dict(killed), dict(whole))
    assert not list(folder.glob(".*"))


# === Files ===


@pytest.mark.any_backend
def test_the_last_few_and_the_best_are_kept(tmp_path):
    model = make_model()
    validation = pairs(8, seed=1)
    _, history = run(
        pairs(20),
        tmp_path,
        model=model,
        save_every="epoch",
        keep=2,
        monitor="val_loss",
        fit={"epochs": 5, "batch_size": 4, "validation_data": validation},
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.npz", "step-000000020.npz", "step-000000025.npz"]
    _, facts = read_checkpoint(tmp_path / "best.npz")
    best = int(np.argmin(history.history["val_loss"]))
    assert facts["epoch"] == best + 1
    saved = [row["logs"]["val_loss"] for row in facts["history"]]
    assert min(saved) == history.history["val_loss"][best]


@pytest.mark.any_backend
def test_the_best_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    files = CheckpointFiles(tmp_path)
    for step in (1, 2):
        path = files.write(step, {"array": np.arange(step)}, {"step": step})
        files.mark_best(path)
    files.write(3, {"array": np.arange(3)}, {"step": 3})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.npz", "step-000000003.npz"]
    arrays, facts = read_checkpoint(tmp_path / "best.npz")
    assert facts == {"step": 2}
    np.testing.assert_array_equal(arrays["array"], [0, 1])


@pytest.mark.any_backend
def test_a_checkpoint_is_written_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    # As on Windows.
    monkeypatch.delattr(os, "O_DIRECTORY")
    system_open = os.open

    def open_file(path, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return system_open(path, *args, **options)

    monkeypatch.setattr(os, "open", open_file)
    CheckpointFiles(tmp_path).write(1, {"array": np.arange(3)}, {"step": 1})
    _, arrays, facts = CheckpointFiles(tmp_path).read_last()
    assert facts["step"] == 1
    np.testing.assert_array_equal(arrays["array"], np.arange(3))


@pytest.mark.any_backend
def test_a_folder_on_remote_storage_is_written_and_resumed_from(whole, shards):
    memory = fsspec.filesystem("memory")
    expected, history = whole
    folder = "memory://checkpoints/a run"
    options = dict(keep=2, monitor="loss")
    run(make_dataset(shards), folder, stop=5, **options)
    last = f"{folder}/step-000000004.npz"
    assert CheckpointFiles(folder).paths()[-1] == last
    # What a process that was killed has left, and a file cut short.
    memory.pipe("/checkpoints/a run/.step-000000005.npz.1.part", b"a part")
    memory.pipe("/checkpoints/a run/step-000000005.npz", b"a part")
    with pytest.warns(UserWarning, match=r"step-000000005\.npz cannot be read"):
        found, resumed = run(make_dataset(shards), folder, **options)
    assert_same_weights(found, expected)
    assert resumed.history == history.history
    names = [path.rpartition("/")[2] for path in memory.ls("/checkpoints/a run", False)]
    assert sorted(names) == [
        "best.npz",
        "step-000000005.npz.damaged",
        "step-000000008.npz",
        "step-000000009.npz",
    ]
    _, facts = read_checkpoint(f"{folder}/best.npz")
    assert facts["epoch"] == int(np.argmin(history.history["loss"])) + 1
    # One checkpoint by its address.
    found, _ = run(
        make_dataset(shards),
        folder,
        fit={"resume_from": f"{folder}/step-000000009.npz"},
    )
    assert_same_weights(found, expected)
    with pytest.raises(FileNotFoundError, match=r"`resume_from`.*memory://check"):
        run(make_dataset(shards), folder, fit={"resume_from": f"{folder}/step-1.npz"})


@pytest.mark.any_backend
def test_a_storage_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"`directory` must.*directory='nowhere://run"):
        kcm.callbacks.Checkpoint("nowhere://run")
    with pytest.raises(
        ValueError, match=r"`resume_from` must.*resume_from='nowhere://run"
    ):
        make_model().fit(pairs(), batch_size=4, resume_from="nowhere://run")


# === Files that are written while training continues ===


def pause(monkeypatch):
    """Keeps the thread that writes waiting for an event; returns the event, and whether
    it came, for each file."""
    event, came = threading.Event(), []
    write = CheckpointFiles.write

    def wait_and_write(self, *args):
        came.append(event.wait(60))
        return write(self, *args)

    monkeypatch.setattr(CheckpointFiles, "write", wait_and_write)
    return event, came


def test_steps_do_not_wait_for_a_file(tmp_path, monkeypatch):
    event, came = pause(monkeypatch)

    class Release(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 5:
                assert not [*tmp_path.iterdir()]
                event.set()

    model = make_model()
    checkpoint = kcm.callbacks.Checkpoint(tmp_path, save_every=3, monitor="loss")
    fit = dict(batch_size=4, shuffle=False, verbose=0, resume_from=tmp_path)
    model.fit(pairs(28), callbacks=[Release(), checkpoint], **fit)
    # Of steps 3, 6 and 7: the next save, and the end, have waited.
    assert came == [True] * 3
    names = sorted(path.name for path in tmp_path.iterdir())
    steps = [f"step-{step:09}.npz" for step in (3, 6, 7)]
    assert names == ["best.npz", *steps]
    # What is in a file is what there was before the steps that ran while it waited.
    expected = weights_of(model)
    path = tmp_path / steps[0]
    resumed = make_model()
    resumed.fit(pairs(28), **{**fit, "resume_from": path})
    assert_same_weights(weights_of(resumed), expected)


@pytest.mark.any_backend
def test_an_error_of_writing_stops_training_at_the_next_save_or_the_end(
    tmp_path, monkeypatch
):
    def fail(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    count = CountSteps()
    for save_every, steps in ((2, 5), ("epoch", 7)):
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointFiles, "write", fail)
            checkpoint = kcm.callbacks.Checkpoint(tmp_path, save_every, monitor=None)
            with pytest.raises(OSError, match="No space left"):
                make_model().fit(
                    pairs(28), batch_size=4, verbose=0, callbacks=[count, checkpoint]
                )
        assert count.begun == steps
        # It is raised once.
        assert CheckpointFiles(tmp_path).last_step() == -1


@pytest.mark.any_backend
def test_reading_waits_for_what_is_being_written(tmp_path, monkeypatch):
    event, _ = pause(monkeypatch)
    path = str(tmp_path / "step-000000001.npz")
    for read in (
        lambda: read_resumable(tmp_path)[0],
        lambda: read_resumable(path)[0],
        lambda: CheckpointFiles(tmp_path).paths()[-1],
        lambda: CheckpointFiles(tmp_path).read_last()[0],
    ):
        event.clear()
        CheckpointFiles(tmp_path).start_writing(1, {"x": np.arange(3)}, {"step": 1})
        timer = threading.Timer(0.2, event.set)
        timer.start()
        assert read() == path
        timer.join()
        os.remove(path)


@pytest.mark.any_backend
def test_an_error_of_writing_in_another_process_stops_this_one(tmp_path, monkeypatch):
    module = sys.modules[CheckpointFiles.__module__]
    monkeypatch.setattr(module, "all_gather_object", lambda value: [value, 1])
    count = CountSteps()
    checkpoint = kcm.callbacks.Checkpoint(tmp_path, 2)
    with pytest.raises(OSError, match=r"must be written.*Received: an error in ano"):
        make_model().fit(
            pairs(28), batch_size=4, verbose=0, callbacks=[count, checkpoint]
        )
    assert count.begun == 3


@pytest.mark.any_backend
def test_an_error_of_writing_does_not_hide_that_of_training(tmp_path, monkeypatch):
    def fail(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointFiles, "write", fail)
    for bad, error in ((3, kcm.callbacks.NonFiniteError), (None, KeyboardInterrupt)):
        data = pairs(28)
        data["images"] = data["images"] / np.float32(64) - 2
        if bad is not None:
            data["images"][4 * bad - 4] = np.nan
        callbacks = [kcm.callbacks.Checkpoint(tmp_path, 2, monitor=None), Stop()]
        callbacks = callbacks[: 1 if bad else 2]
        with pytest.raises(error) as raised:
            make_model().fit(
                data, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks
            )
        (note,) = raised.value.__notes__
        assert "could not be written either: OSError(28" in note


@pytest.mark.slow
@pytest.mark.any_backend
def test_a_program_that_ends_finishes_its_file(tmp_path):
    code = f"""
import time
import numpy as np
from keras_cluster_mask.training.checkpoints import CheckpointFiles

class Slow(CheckpointFiles):
    def write(self, *args):
        time.sleep(1)
        super().write(*args)

Slow({str(tmp_path)!r}).start_writing(1, {{"x": np.arange(3)}}, {{"step": 1}})
"""
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=PROGRAM.parents[2], check=True, timeout=300)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.npz"]


# === The best ===


@pytest.mark.any_backend
def test_a_monitored_value_that_is_not_in_the_logs_is_refused(tmp_path):
    fit = {"epochs": 3, "batch_size": 4}
    with pytest.raises(
        ValueError,
        match=r"`monitor`.*`validation_data`.*Received: monitor='val_loss', .*'loss'",
    ):
        run(pairs(), tmp_path, save_every="epoch", monitor="val_loss", fit=fit)
    # The epoch that was trained is not lost.
    assert CheckpointFiles(tmp_path).last_step() == 3
    _, history = run(pairs(), tmp_path, save_every="epoch", monitor="loss", fit=fit)
    assert history.epoch == [0, 1, 2]


@pytest.mark.any_backend
def test_a_monitored_value_may_wait_for_the_validation(tmp_path):
    fit = {
        "epochs": 3,
        "batch_size": 4,
        "validation_data": pairs(8, seed=1),
        "validation_freq": 2,
    }
    run(pairs(), tmp_path, save_every="epoch", monitor="val_loss", fit=fit)
    _, facts = read_checkpoint(tmp_path / "best.npz")
    assert facts["epoch"] == 2


@pytest.mark.any_backend
def test_without_a_monitored_value_there_is_no_best(tmp_path):
    fit = {"batch_size": 4, "verbose": 0}
    make_model().fit(pairs(), callbacks=[kcm.callbacks.Checkpoint(tmp_path)], **fit)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003.npz"]


@pytest.mark.any_backend
def test_a_damaged_file_is_passed_over_with_a_warning(whole, shards, tmp_path):
    expected, _ = whole
    folder = tmp_path / "stopped"
    run(make_dataset(shards), folder, stop=5)
    last = sorted(folder.glob("step-*"))[-1]
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"cannot be read.*the one before"):
        found, _ = run(make_dataset(shards), folder)
    assert_same_weights(found, expected)


@pytest.mark.any_backend
def test_bfloat16_survives_a_file(tmp_path):
    import ml_dtypes

    files = CheckpointFiles(tmp_path, keep=1)
    arrays = {
        "half": np.arange(5).astype(ml_dtypes.bfloat16),
        "count": np.array(3, "int32"),
    }
    files.write(7, arrays, {"step": 7})
    _, found, facts = files.read_last()
    assert facts == {"step": 7}
    assert found.keys() == arrays.keys()
    for key, value in arrays.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)


# === Losses and weights that are not finite ===


def test_a_loss_that_is_not_finite_stops_with_step_samples_and_checkpoint(
    shards, tmp_path
):
    run(make_dataset(shards), tmp_path, fit={"epochs": 2})
    model = make_model()
    last = sorted(tmp_path.glob("step-*"))[-1]

    class Break(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                weight = self.model.trainable_variables[-1]
                weight.assign(np.full(weight.shape, np.nan))

    checkpoint = kcm.callbacks.Checkpoint(tmp_path, save_every=5, monitor=None)
    with pytest.raises(
        kcm.callbacks.NonFiniteError,
        match=rf"samples \d{{4}}, .*{last.name}.*Received: loss=nan at step 9",
    ):
        model.fit(
            make_dataset(shards),
            epochs=3,
            verbose=0,
            resume_from=tmp_path,
            callbacks=[Break(), checkpoint],
        )
    # What was saved last is still what a new run starts from.
    assert sorted(tmp_path.glob("step-*"))[-1] == last


@pytest.mark.parametrize("kind", ["arrays", "list", "dataset"])
def test_samples_of_a_bad_batch_are_named_by_their_sample_id(kind, tmp_path):
    import tensorflow as tf

    data, fit = pairs(20), {"shuffle": False, "batch_size": 4}
    data["images"] = data["images"] / np.float32(64) - 2
    data["images"][13] = np.nan
    data["sample_id"] = np.array([f"image {index}" for index in range(20)])
    if kind == "list":
        data["sample_id"] = data["sample_id"].tolist()
    if kind == "dataset":
        data, fit = tf.data.Dataset.from_tensor_slices(data).batch(4), {}
    # From the start, and by a run that resumes within the epoch.
    run(data, tmp_path / "stopped", stop=2, fit=fit)
    for folder in ("fresh", "stopped"):
        with pytest.raises(
            kcm.callbacks.NonFiniteError,
            match=r"samples image 12, image 13, image 14, image 15\.",
        ):
            run(data, tmp_path / folder, fit=fit)


def long_run(folder, bad=None, save_every="epoch", callbacks=(), **options):
    """An epoch of 130 steps, with an image that is not finite in one of them."""
    data = random_pairs(260)
    data["images"] = data["images"] / np.float32(64) - 2
    data["sample_id"] = np.arange(260)
    if bad is not None:
        data["images"][2 * bad] = np.nan
    model = kcm.ContrastiveModel(image_mlp(), text_bag())
    model.compile(keras.optimizers.SGD(0.01), **FAST, **options)
    checkpoint = kcm.callbacks.Checkpoint(folder, save_every, keep=99, monitor=None)
    fit = dict(batch_size=2, shuffle=False, verbose=0)
    model.fit(data, callbacks=[*callbacks, checkpoint], **fit)
    return model


class CountSteps(keras.callbacks.Callback):
    begun = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.begun = batch + 1


@pytest.mark.parametrize(
    ("bad", "save_every", "last_saved", "stops_before"),
    [
        # At a save, 100 steps after the last look, and at the end of the epoch.
        (47, 20, 40, 61),
        (3, "epoch", None, 101),
        (99, "epoch", None, 101),
        (100, "epoch", None, 131),
        (129, 60, 120, 131),
    ],
)
def test_a_bad_step_is_named_though_it_is_noticed_later(
    bad, save_every, last_saved, stops_before, tmp_path
):
    count = CountSteps()
    saved = rf"step-{last_saved:09}\.npz" if last_saved else "none"
    with pytest.raises(
        kcm.callbacks.NonFiniteError,
        match=rf"samples {2 * bad}, {2 * bad + 1}\..*checkpoint is \S*{saved}\. "
        rf"Received: loss=nan at step {bad + 1} \(epoch 1, its step {bad + 1}\)",
    ):
        long_run(tmp_path, bad, save_every, [count])
    assert count.begun <= stops_before
    assert CheckpointFiles(tmp_path).last_step() == (last_saved or -1)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras takes single steps there.")
@pytest.mark.parametrize("bad", [50, 129])
def test_a_bad_step_of_several_that_run_at_once_is_named(bad, tmp_path):
    with pytest.raises(
        kcm.callbacks.NonFiniteError,
        match=rf"samples {2 * bad},.*Received: loss=nan at step {bad + 1} \(epoch 1",
    ):
        long_run(tmp_path, bad, steps_per_execution=5)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras takes single steps there.")
def test_the_last_of_several_steps_that_run_at_once_may_be_missing(tmp_path):
    import tensorflow as tf

    # 10 steps an epoch, four at a time, are twice four and two.
    data = tf.data.Dataset.from_tensor_slices(random_pairs(20)).batch(2)
    model = kcm.ContrastiveModel(image_mlp(), text_bag())
    model.compile("sgd", **FAST, steps_per_execution=4)
    run(data, tmp_path, model=model, save_every=8, keep=9, fit={"epochs": 2})
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 20
    places = []
    for path in CheckpointFiles(tmp_path).paths():
        _, facts = read_checkpoint(path)
        places.append((facts["step"], facts["epoch"], facts["epoch_step"]))
    assert places == [(8, 0, 8), (10, 1, 0), (18, 1, 8), (20, 2, 0)]


@pytest.mark.skipif(BACKEND != "jax", reason="The state of a model is apart on JAX.")
def test_the_state_of_the_model_is_left_alone_between_saves(tmp_path, monkeypatch):
    count, seen = CountSteps(), []

    class Model(kcm.ContrastiveModel):
        def jax_state_sync(self):
            seen.append(count.begun)
            super().jax_state_sync()

    monkeypatch.setattr(kcm, "ContrastiveModel", Model)
    long_run(tmp_path, save_every=60, callbacks=[count, kcm.callbacks.Throughput()])
    # A batch has begun when the steps before it are saved.
    assert {*seen} == {0, 61, 121, 130}


def test_a_step_that_does_not_count_is_an_error(tmp_path):
    class Model(kcm.ContrastiveModel):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            return self.get_metrics_result()

    model = Model(image_mlp(), text_bag())
    model.compile("sgd", **FAST)
    with pytest.raises(RuntimeError, match=r"`compute_metrics`.*Received: a Model"):
        run(random_pairs(8), tmp_path, model=model, fit={"batch_size": 4})
    assert CheckpointFiles(tmp_path).last_step() == -1


def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path):
    model = make_model(optimizer=keras.optimizers.SGD(1e38))
    fit = {"shuffle": False, "batch_size": 4, "epochs": 1}
    with pytest.raises(
        kcm.callbacks.NonFiniteError,
        match=r"weights.*checkpoint is none.*Received: .* after step 1 \(epoch 1, its",
    ):
        run(pairs(), tmp_path, model=model, save_every=1, fit=fit)
    assert CheckpointFiles(tmp_path).last_step() == -1


@pytest.mark.any_backend
@pytest.mark.parametrize("save_every", [1, "epoch"])
def test_moments_that_are_infinite_are_not_saved(save_every, tmp_path):
    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                moment = self.model.optimizer.variables[-1]
                moment.assign(np.full(moment.shape, np.inf))

    checkpoint = kcm.callbacks.Checkpoint(tmp_path, save_every, monitor=None)
    model = make_model(optimizer="adam")
    with pytest.raises(
        kcm.callbacks.NonFiniteError, match=r"Received: adam\w*/.* step 3"
    ):
        model.fit(
            pairs(),
            batch_size=4,
            shuffle=False,
            verbose=0,
            callbacks=[Break(), checkpoint],
        )
    assert CheckpointFiles(tmp_path).last_step() == (2 if save_every == 1 else -1)


@pytest.mark.any_backend
def test_all_processes_stop_at_weights_that_are_infinite_in_one(tmp_path, monkeypatch):
    module = sys.modules[kcm.callbacks.Checkpoint.__module__]

    def gather(value):
        # -1 is of a folder without checkpoints.
        return [value, value if value < 0 else 1]

    monkeypatch.setattr(module, "all_gather_object", gather)
    with pytest.raises(kcm.callbacks.NonFiniteError):
        run(pairs(), tmp_path, save_every="epoch")


# === What the model was compiled with ===


def fit_epochs(folder, epochs, optimizer, callbacks=(), **options):
    """Trains to the end of an epoch, from a checkpoint if there is one."""
    model = kcm.ContrastiveModel(image_mlp(), text_bag())
    model.compile(optimizer, **FAST, **options)
    model.fit(
        random_pairs(8),
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        resume_from=folder,
        callbacks=[*callbacks, kcm.callbacks.Checkpoint(folder, monitor=None)],
    )
    return model


def decay(steps):
    return keras.optimizers.schedules.CosineDecay(0.01, steps)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (dict(), dict(learning_rate=0.1), r"learning_rate: 0\.01 in the ch.*, 0\.1 in"),
        (dict(), dict(weight_decay=0.3), r"optimizer\.weight_decay: 0\.004 in.*, 0\.3"),
        (dict(), dict(clipnorm=1.0), r"optimizer\.clipnorm: None in.*, 1\.0 in"),
        (dict(), dict(learning_rate=decay(9)), r"0\.01 in the ch.*CosineDecay\(.*9"),
        (dict(learning_rate=decay(9)), dict(), r"CosineDecay\(.*, 0\.01 in the"),
        (dict(learning_rate=decay(9)), dict(learning_rate=decay(8)), r"steps=9.*s=8"),
    ],
)
def test_a_resumed_run_takes_the_options_that_it_is_given_and_warns(
    before, after, message, tmp_path
):
    def optimizer(**options):
        return keras.optimizers.AdamW(**{"learning_rate": 0.01, **options})

    trained = fit_epochs(tmp_path, 1, optimizer(**before)).optimizer
    with pytest.warns(UserWarning, match="differ.*" + message):
        resumed = fit_epochs(tmp_path, 1, optimizer(**after)).optimizer
    expected = optimizer(**after)
    assert resumed.get_config() == {**expected.get_config(), "name": resumed.name}
    # The steps that were done count for a schedule too.
    assert int(ops.convert_to_numpy(resumed.iterations)) == 2
    moments = [
        [x for x in values(each.variables) if x.ndim] for each in (trained, resumed)
    ]
    assert len(moments[0]) > 2
    for found, given in zip(moments[1], moments[0], strict=True):
        np.testing.assert_array_equal(found, given)


def test_new_options_reach_the_weights_of_a_resumed_run(tmp_path):
    fit_epochs(tmp_path, 1, keras.optimizers.SGD(0.01))
    with pytest.warns(UserWarning, match=r"optimizer\.learning_rate: 0\.01"):
        model = fit_epochs(tmp_path, 2, keras.optimizers.SGD(0.0))
    _, state, _ = CheckpointFiles(tmp_path).read_last()
    before, _ = read_checkpoint(min(tmp_path.glob("step-*")))
    weights = [f"model/{index}" for index in range(len(model.variables))]
    for key in weights:
        np.testing.assert_array_equal(state[key], before[key])


@pytest.mark.any_backend
def test_changed_multipliers_and_decay_of_vectors_are_named(tmp_path):
    multipliers = {"learning_rate_multipliers": {"image": 0.5}}
    fit_epochs(tmp_path, 1, "sgd")
    with pytest.warns(UserWarning, match=r"learning_rate_multipliers: \{\} in.*0\.5"):
        fit_epochs(tmp_path, 2, "sgd", **multipliers)
    with pytest.warns(UserWarning, match="decay_vectors: False in.*True in"):
        fit_epochs(tmp_path, 3, "sgd", decay_vectors=True, **multipliers)


def test_a_learning_rate_that_a_callback_changed_is_resumed(tmp_path):
    def halve(epoch, learning_rate):
        return learning_rate / 2

    def fit(epochs, learning_rate, *callbacks):
        optimizer = keras.optimizers.Adam(learning_rate)
        model = fit_epochs(tmp_path, epochs, optimizer, callbacks)
        return float(ops.convert_to_numpy(model.optimizer.learning_rate))

    halving = keras.callbacks.LearningRateScheduler(halve)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert fit(2, 0.01, halving) == pytest.approx(0.0025)
        assert fit(2, 0.01) == pytest.approx(0.0025)
        assert fit(3, 0.01, halving) == pytest.approx(0.00125)
    with pytest.warns(UserWarning, match=r"0\.01 in the checkpoint, 0\.04 in"):
        assert fit(4, 0.04, halving) == pytest.approx(0.02)


@pytest.mark.any_backend
def test_a_learning_rate_that_was_changed_in_this_process_is_no_difference(tmp_path):
    model = kcm.ContrastiveModel(image_mlp(), text_bag())
    model.compile(keras.optimizers.Adam(0.01), **FAST)
    halving = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    checkpoint = kcm.callbacks.Checkpoint(tmp_path, monitor=None)
    fit = dict(batch_size=4, verbose=0, resume_from=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for epochs in (1, 2):
            model.fit(
                random_pairs(8), epochs=epochs, callbacks=[halving, checkpoint], **fit
            )
    rate = float(ops.convert_to_numpy(model.optimizer.learning_rate))
    assert rate == pytest.approx(0.0025)


@pytest.mark.any_backend
def test_a_changed_learning_rate_of_one_of_several_optimizers_is_named(tmp_path):
    def optimizer(learning_rate):
        def select(variable):
            if "bias" in variable.path:
                return keras.optimizers.SGD(learning_rate)
            return keras.optimizers.Adam(0.01)

        return keras.optimizers.MultiOptimizer(select)

    fit_epochs(tmp_path, 1, optimizer(0.1), decay_vectors=True)
    with pytest.warns(UserWarning, match=r"optimizers\[\d\]\.learning_rate: 0\.1 in"):
        resumed = fit_epochs(tmp_path, 1, optimizer(0.2), decay_vectors=True)
    rates = [each.learning_rate for each in resumed.optimizer.optimizers]
    rates = {round(float(ops.convert_to_numpy(rate)), 5) for rate in rates}
    assert rates == {0.2, 0.01}


# === Refusals ===


@pytest.mark.any_backend
def test_a_checkpoint_of_another_masking_is_refused_by_field(tmp_path):
    run(pairs(), tmp_path, save_every="epoch", fit={"epochs": 1})
    masking = kcm.ClusterMasking(
        4, min_mask_ratio=0.25, threshold=0.1, anchor_ratio=0.2, hide_padding=False
    )
    with pytest.raises(ValueError, match=r"anchor_ratio: 0.03 in the checkpoint, 0.2"):
        run(pairs(), tmp_path, model=make_model(masking), save_every="epoch")


@pytest.mark.any_backend
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_a_checkpoint_of_another_number_of_views_is_refused(before, after, tmp_path):
    run(random_pairs(8), tmp_path, model=several_views(before), fit={"epochs": 1})
    with pytest.raises(ValueError, match=r"Received: .*views: .* in the checkpoint"):
        run(random_pairs(8), tmp_path, model=several_views(after))


@pytest.mark.any_backend
def test_checkpoints_name_views_only_where_there_are_several():
    # Those that were saved before there were views are of one view.
    assert "views" not in describe(several_views(1))
    assert describe(several_views(2))["views"] == 2


@pytest.mark.any_backend
def test_a_checkpoint_of_another_optimizer_is_refused(shards, tmp_path):
    run(make_dataset(shards), tmp_path, fit={"epochs": 1})
    with pytest.raises(ValueError, match=r"optimizer: 'AdamW' in.*'SGD' in"):
        run(make_dataset(shards), tmp_path, model=make_model(optimizer="sgd"))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 8}, r"data\.seed: 7 in the checkpoint, 8 in"),
        ({"batch_size": 9}, r"data\.batch_size: 8 in the checkpoint, 9 in"),
        ({"image_size": 24}, r"data\.image_size: \[16, 16\] in .*, \[24, 24\] in"),
        ({"crop_scale": (0.9, 1.0)}, r"data\.crop_scale: \[0\.4, 1\.0\] in .*0\.9"),
        ({"resize": "squash"}, r"data\.crop_scale: \[0\.4, 1\.0\] in .*None in"),
        ({"block_size": 4}, r"data\.block_size: 1 in the checkpoint, 4 in"),
    ],
)
def test_a_checkpoint_of_data_with_another_option_is_refused(
    options, message, shards, saved
):
    with pytest.raises(ValueError, match=r"`resume_from` must.*Received:.*" + message):
        run(make_dataset(shards, **options), saved)


@pytest.mark.any_backend
def test_a_checkpoint_of_other_shards_is_refused(shards, saved, write_pairs):
    other = write_pairs("c.tar", 27, 3)
    for others in ([*shards, other], shards[:1], [shards[0], other]):
        with pytest.raises(ValueError, match=r"Received:.*data\.index: .* in"):
            run(make_dataset(others), saved)


@pytest.fixture(scope="module")
def saved(shards, tmp_path_factory):
    """The checkpoints of an epoch."""
    folder = tmp_path_factory.mktemp("saved")
    run(make_dataset(shards), folder, fit={"epochs": 1})
    return folder


@pytest.mark.any_backend
def test_a_checkpoint_of_a_model_of_another_size_is_refused(tmp_path):
    run(pairs(), tmp_path, save_every="epoch", fit={"epochs": 1})
    images, ids = keras.Input((16, 16, 3)), keras.Input((9,), dtype="int32")
    model = kcm.ContrastiveModel(
        keras.Model(images, keras.layers.GlobalAveragePooling2D()(images)),
        keras.Model(
            ids,
            keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(300, 3)(ids)),
        ),
    )
    model.compile("adamw")
    with pytest.raises(ValueError, match="number of variables"):
        run(pairs(), tmp_path, model=model, save_every="epoch")


@pytest.mark.any_backend
def test_steps_cannot_be_saved_of_data_that_is_not_found_again(tmp_path):
    with pytest.raises(ValueError, match=r"Received: data of type generator"):
        run(((x,) for x in [pairs()]), tmp_path, save_every=2)
    data = ((x,) for x in [pairs()])
    with pytest.raises(ValueError, match=r"Received: steps_per_epoch=2, data of"):
        run(data, tmp_path, save_every="epoch", fit={"steps_per_epoch": 2})


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(save_every=0), "`save_every`.*Received: save_every=0"),
        (dict(save_every="step"), "`save_every`.*Received: save_every='step'"),
        (dict(keep=0), "`keep`.*Received: keep=0"),
        (dict(mode="best"), "`mode`.*Received: mode='best'"),
        (dict(mode="max"), "`mode`.*`monitor`.*Received: mode='max', monitor=None"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        kcm.callbacks.Checkpoint(tmp_path, **options)


@pytest.mark.any_backend
def test_another_model_than_a_contrastive_one_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"ContrastiveModel.*Received: a Sequential"):
        model.fit(
            np.ones((4, 2)),
            np.ones((4, 1)),
            verbose=0,
            callbacks=[kcm.callbacks.Checkpoint(tmp_path)],
        )
