"""A run that was interrupted and resumed ends as if it had not been."""

import contextlib
import errno
import gc
import os
import random
import signal
import subprocess
import sys
import weakref

import fsspec
import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.training.checkpoints import saved_epochs
from tests.helpers import (
    FAST,
    MASKINGS,
    assert_close,
    assert_same_values,
    by_tower,
    compiled_model,
    random_pairs,
    run_program,
    small_model,
    values,
)
from tests.models.test_without_masking import Scaled
from tests.training.training_run import (
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
ARRAYS = {"shuffle": False, "batch_size": 4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_pairs_to):
    folder = tmp_path_factory.mktemp("shards")
    return [
        write_pairs_to(folder / "a.tar", 0, 16),
        write_pairs_to(folder / "b.tar", 16, 11),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the checkpoints of `whole`."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(shards, folder):
    """The weights and the history of a run that nothing interrupts."""
    return run(make_dataset(shards), folder)


def run(data, folder, stop=None, model=None, callbacks=(), save_every=1, keep=3, **fit):
    """Trains for three epochs, or from a checkpoint, and saves more of them.

    Returns:
        The weights and the history, or `None` if the run was stopped.
    """
    model, history = model or make_model(), None
    callbacks = [*callbacks, kcm.callbacks.Checkpoint(folder, save_every, keep)]
    if stop:
        callbacks.append(StopAfter(stop))
    fit = {"epochs": 3, "verbose": 0, "resume_from": folder, **fit}
    with contextlib.suppress(KeyboardInterrupt):
        history = model.fit(data, callbacks=callbacks, **fit)
    return weights_of(model), history


def assert_same_runs(found, expected):
    assert_same_values(found[0], expected[0])
    assert found[1].epoch == expected[1].epoch
    assert found[1].history == expected[1].history


def plain_model(optimizer="sgd", micro_batch_size=None, **options):
    keras.utils.set_random_seed(0)
    model = small_model(micro_batch_size=micro_batch_size)
    model.compile(optimizer, **FAST, **options)
    return model


def run_plain(folder, epochs, optimizer="sgd", callbacks=(), **options):
    """Trains a model without a state to the end of an epoch of two steps."""
    model = plain_model(optimizer, **options)
    run(random_pairs(8), folder, None, model, callbacks, epochs=epochs, **ARRAYS)
    return model


# === Resuming ===


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize("stop", [5, 1, 6, STEPS])
def test_a_run_that_was_stopped_ends_where_one_that_was_not_does(
    stop, whole, shards, tmp_path
):
    # In a later epoch, in the first, at the last step of one and of all; with dropout,
    # a moving threshold, a learning rate schedule and averages.
    _, history = whole
    assert history.epoch == [0, 1, 2]
    assert all(np.isfinite(history.history["loss"]))
    run(make_dataset(shards), tmp_path, stop)
    # And a run that is finished gives its weights and history again.
    for _ in range(2):
        assert_same_runs(run(make_dataset(shards), tmp_path), whole)
    _, longer = run(make_dataset(shards), tmp_path, epochs=4)
    assert longer.epoch == [0, 1, 2, 3]


@pytest.mark.any_backend
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 1)])
def test_a_run_resumes_with_other_workers(before, after, whole, shards, tmp_path):
    run(make_dataset(shards, num_workers=before), tmp_path, stop=5)
    assert_same_runs(run(make_dataset(shards, num_workers=after), tmp_path), whole)


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize("kind", ["stream", "dataset"])
def test_epochs_of_so_many_steps_continue_through_the_data(kind, shards, tmp_path):
    import tensorflow as tf

    def data():
        if kind == "stream":
            return make_dataset(shards)
        return tf.data.Dataset.from_tensor_slices(pairs()).batch(4).repeat()

    model = make_model()
    # 12 steps: 4 times the data.
    expected = run(data(), tmp_path / "whole", model=model, steps_per_epoch=4)
    assert int(model.optimizer.iterations.numpy()) == 12
    run(data(), tmp_path / "stopped", stop=7, steps_per_epoch=4)
    assert_same_runs(run(data(), tmp_path / "stopped", steps_per_epoch=4), expected)
    with pytest.raises(ValueError, match=r"data\.steps_per_epoch: 4 then, 5 now"):
        run(data(), tmp_path / "whole", steps_per_epoch=5)


@pytest.mark.any_backend
def test_samples_that_do_not_decode_do_not_shift_what_is_left(write_pairs, tmp_path):
    broken = [("bad.png", b"no image"), ("bad.txt", b"bad")]
    shard = write_pairs("a.tar", 0, 40, broken=broken)
    with pytest.warns(UserWarning, match="cannot be decoded"):
        expected, _, found = (
            run(make_dataset(shard, max_skipped=0.5), tmp_path / folder, stop)[0]
            for folder, stop in (("whole", None), ("stopped", 7), ("stopped", None))
        )
    assert_same_values(found, expected)


def unknown_length():
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(pairs()).batch(4, drop_remainder=True)
    return data.filter(lambda batch: True)


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize(
    ("make", "masking", "options"),
    [
        (pairs, "threshold", ARRAYS),
        (unknown_length, "threshold", {}),
        pytest.param(
            lambda: pairs(15),
            "threshold",
            {**ARRAYS, "validation_data": None, "validation_split": 0.2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_arrays_and_other_datasets_resume_with_an_epoch(
    make, masking, options, tmp_path
):
    def run_until(stop, folder):
        keras.utils.set_random_seed(1)
        model = make_model(MASKINGS[masking](seed=3))
        validation = {"validation_data": pairs(8, seed=1), "validation_batch_size": 4}
        return run(data, tmp_path / folder, stop, model, **{**validation, **options})

    data = make()
    expected, history = run_until(None, "whole")
    for stop in (5, 6):
        run_until(stop, f"stopped-{stop}")
        found, resumed = run_until(None, f"stopped-{stop}")
        assert_same_values(found, expected)
        assert_close(resumed.history, history.history, atol=0.0, rtol=1e-6)


@pytest.mark.any_backend
def test_a_folder_on_remote_storage_is_written_and_resumed_from(whole, shards):
    memory = fsspec.filesystem("memory")
    folder = "memory://checkpoints/a run"
    run(make_dataset(shards), folder, stop=7, keep=2)
    assert saved_epochs(folder)[2] == f"{folder}/epoch-00002.npz"
    # What a process that was killed has left.
    memory.pipe("/checkpoints/a run/.epoch-00003.npz.1.part", b"a part")
    assert_same_runs(run(make_dataset(shards), folder, keep=2), whole)
    names = [path.rpartition("/")[2] for path in memory.ls("/checkpoints/a run", False)]
    assert sorted(names) == ["epoch-00002.npz", "epoch-00003.npz"]
    with pytest.raises(FileNotFoundError, match=r"a run/epoch-1\.npz"):
        run(make_dataset(shards), folder, resume_from=f"{folder}/epoch-1.npz")


@pytest.mark.any_backend
def test_a_run_says_where_it_starts(whole, folder, shards, tmp_path, capsys):
    def fit(start):
        model = make_model()
        fit = {"epochs": 3, "resume_from": start, "verbose": 2}
        history = model.fit(make_dataset(shards), **fit)
        return (weights_of(model), history), capsys.readouterr().out

    for start, expected in (
        (tmp_path, f"No checkpoint in {tmp_path}: starting from scratch"),
        (folder / "epoch-00001.npz", "epoch-00001.npz, after epoch 1."),
        (folder, "epoch-00003.npz, after epoch 3."),
    ):
        found, printed = fit(start)
        assert expected in printed
        assert ("Epoch 1/3" in printed) == (start == tmp_path)
        assert ("Epoch 2/3" in printed) == (start != folder)
        assert_same_runs(found, whole)


# === What a resumed run may change ===


def decay(steps):
    return keras.optimizers.schedules.CosineDecay(0.01, steps)


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"learning_rate": 0.1}),
        ({}, {"weight_decay": 0.3}),
        ({}, {"learning_rate": decay(9)}),
        ({"learning_rate": decay(9)}, {}),
        ({"learning_rate": decay(9)}, {"learning_rate": decay(8)}),
    ],
)
def test_a_resumed_run_takes_the_options_that_it_is_given(before, after, tmp_path):
    trained, resumed = (
        run_plain(
            tmp_path, 1, keras.optimizers.AdamW(**{"learning_rate": 0.01, **options})
        ).optimizer
        for options in (before, after)
    )
    expected = keras.optimizers.AdamW(**{"learning_rate": 0.01, **after})
    assert resumed.get_config() == {**expected.get_config(), "name": resumed.name}
    # The steps that were done count for a schedule too.
    assert int(ops.convert_to_numpy(resumed.iterations)) == 2
    moments = [
        [x for x in values(each.variables) if x.ndim] for each in (trained, resumed)
    ]
    assert len(moments[0]) > 2
    assert_same_values(*moments)


def test_a_learning_rate_that_a_callback_changed_is_resumed(tmp_path):
    def halve(model, epochs):
        halving = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        run(random_pairs(8), tmp_path, None, model, [halving], epochs=epochs, **ARRAYS)
        return rate_of(model)

    def rate_of(model):
        return float(ops.convert_to_numpy(model.optimizer.learning_rate))

    def make(learning_rate):
        return plain_model(keras.optimizers.Adam(learning_rate))

    model = make(0.01)
    assert halve(model, 1) == pytest.approx(0.005)
    # In this process, and in a new one.
    assert halve(model, 2) == pytest.approx(0.0025)
    resumed = run_plain(tmp_path, 2, keras.optimizers.Adam(0.01))
    assert rate_of(resumed) == pytest.approx(0.0025)
    assert halve(make(0.01), 4) == pytest.approx(0.000625)
    # Another one is the user's.
    assert halve(make(0.04), 5) == pytest.approx(0.02)


@pytest.mark.any_backend
def test_learning_rates_of_several_optimizers_are_each_their_own(tmp_path):
    def optimizer(learning_rate):
        parts = {".*bias": keras.optimizers.SGD(learning_rate)}
        default = keras.optimizers.Adam(0.01)
        rates = keras.optimizers.OptimizerMap(default, parts)
        return keras.optimizers.MultiOptimizer(rates)

    for rate in (0.1, 0.2):
        model = run_plain(tmp_path, 1, optimizer(rate))
    rates = [each.learning_rate for each in model.optimizer.optimizers]
    assert values(rates) == pytest.approx([0.2, 0.01])


@pytest.mark.any_backend
def test_what_a_step_does_in_another_way_may_change(tmp_path):
    expected = run_plain(tmp_path / "whole", 2)
    run_plain(tmp_path / "resumed", 1)
    found = run_plain(tmp_path / "resumed", 2, micro_batch_size=2)
    assert_close(found.weights, expected.weights, 1e-5)


# === What must be the same ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("data", "model", "field"),
    [
        ({"seed": 8}, {}, "data.seed: 7 then, 8 now"),
        (
            {"resize": "squash"},
            {},
            "data.resize: 'crop' then, 'squash' now",
        ),
        ({"shards": 1}, {}, "the list of samples"),
        (
            {},
            {"masking": kcm.RandomMasking()},
            "maskings.0.class: 'ClusterMasking' then",
        ),
        (
            {},
            {"masking": MASKINGS["threshold"](anchor_ratio=0.2)},
            "maskings.0.anchor_ratio: 0.03 then, 0.2 now",
        ),
        (
            {},
            {"masking": MASKINGS["threshold"](seed=4)},
            "1 differences, with maskings.0.seed: 3 then, 4 now",
        ),
        (
            {},
            {"masking": MASKINGS["threshold"](seed=3, highest=0.7)},
            "embedding_weight.config.end_learning_rate: 0.8 then, 0.7 now",
        ),
        ({}, {"optimizer": "sgd"}, "optimizer.0: 'AdamW' then, 'SGD' now"),
    ],
)
def test_data_or_a_model_with_another_option_is_refused(
    data, model, field, whole, folder, shards
):
    chosen = shards[: data.get("shards", 2)]
    data = {name: value for name, value in data.items() if name != "shards"}
    with pytest.raises(ValueError, match=r"`resume_from` must.*Received:") as raised:
        run(make_dataset(chosen, **data), folder, model=make_model(**model))
    assert field in str(raised.value)


@pytest.mark.any_backend
def test_pixel_statistics_must_be_the_same(tmp_path):
    def fit(mean, epochs):
        model = small_model(pixel_mean=(mean,) * 3, pixel_std=(0.5,) * 3)
        model.compile("sgd", **FAST)
        run(random_pairs(8), tmp_path, None, model, epochs=epochs, **ARRAYS)

    fit(0.5, 1)
    with pytest.raises(ValueError, match=r"pixel_mean\.0: 0\.5 then, 0\.1 now"):
        fit(0.1, 2)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ("images", r"data\.arrays\.images: "),
        ("sample_weight", r"data\.arrays\.sample_weight: "),
        ("rows", "the samples"),
    ],
)
def test_other_images_and_weights_of_the_same_texts_are_refused(
    changed, field, tmp_path
):
    data = {**random_pairs(64), "sample_weight": np.ones(64, "float32")}
    fit = {"model": compiled_model(), "epochs": 1}

    def given():
        if changed != "rows":
            return data
        rows = [{"image": image, "caption": "no 1"} for image in data["images"]]
        return make_dataset(rows)

    run(given(), tmp_path, **fit)
    # Without a change, it resumes after its last epoch.
    run(given(), tmp_path, **fit)
    data["images" if changed == "rows" else changed][62] = 0
    with pytest.raises(ValueError, match=f"1 differences, with {field}"):
        run(given(), tmp_path, **fit)


@pytest.mark.any_backend
def test_optimizers_of_towers_activations_and_own_arguments_must_be_the_same(tmp_path):
    def fit(image="adam", activation="gelu", factor=1.0, limit=100.0):
        backbone = kcm.models.clip_backbone("tiny", 16, 100, 7, activation=activation)
        head = kcm.models.ContrastiveHead(max_logit_scale=limit)
        model = Scaled.from_backbone(backbone, factor=factor, head=head)
        image = keras.optimizers.get(image)
        model.compile(by_tower(model, "adam", image=image), **FAST)
        run(random_pairs(8), tmp_path, model=model, epochs=1, **ARRAYS)

    fit()
    for other, message in (
        ({"image": "rmsprop"}, r"optimizer\.1: .*'RMSprop'"),
        ({"activation": "quick_gelu"}, r"layers\.\d+: .*'quick_gelu'"),
        ({"factor": 2.0}, r"model\.factor: 1\.0 then, 2\.0 now"),
        ({"limit": 50.0}, r"head\.max_logit_scale: 100\.0 then, 50\.0 now"),
    ):
        with pytest.raises(ValueError, match=f"with {message}"):
            fit(**other)


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
    fit = dict(callbacks=[StopBefore(step)], save_every=save_every)
    _, history = run(make_dataset(shards), tmp_path, **fit)
    assert history.epoch == epochs
    assert [*saved_epochs(tmp_path)] == [1]
    assert_same_runs(run(make_dataset(shards), tmp_path), whole)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("save_every", "keep", "expected"),
    [(1, 2, [4, 5]), (1, 9, [1, 2, 3, 4, 5]), (2, 9, [2, 4, 5]), (9, 1, [5])],
)
def test_every_so_many_epochs_and_the_last_are_saved(
    save_every, keep, expected, tmp_path
):
    options = dict(model=compiled_model(), save_every=save_every, keep=keep)
    run(random_pairs(8), tmp_path, epochs=5, **options, **ARRAYS)
    assert [*saved_epochs(tmp_path)] == expected


@pytest.mark.any_backend
def test_weights_in_half_precision_are_resumed_as_they_were(tmp_path):
    models = []
    for _ in range(2):
        models.append(compiled_model(projection_dim=8, dtype="bfloat16"))
        run(random_pairs(8), tmp_path, None, models[-1], epochs=1, **ARRAYS)
    trained, resumed = models
    assert "bfloat16" in {v.dtype for v in resumed.weights}
    assert_same_values(resumed.weights, trained.weights)


@pytest.mark.skipif(BACKEND != "jax", reason="The state of a model is apart on JAX.")
def test_the_state_of_the_model_is_left_alone_between_saves(tmp_path, monkeypatch):
    seen = []
    # Keras 3.15 has the second name.
    name = "state_sync" if hasattr(keras.Model, "state_sync") else "jax_state_sync"
    sync = getattr(keras.Model, name)

    def seen_sync(model):
        seen.append(len(steps))
        sync(model)

    monkeypatch.setattr(keras.Model, name, seen_sync)
    data, steps = random_pairs(40), []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: steps.append(batch)
    )
    options = {"epochs": 1, "batch_size": 2, "callbacks": [note]}
    run(data, tmp_path, model=compiled_model(), **options)
    assert {*seen} == {0, 20}


@pytest.mark.any_backend
def test_the_callback_of_an_interrupted_fit_does_not_keep_the_data(tmp_path):
    data, callback = pairs(8), kcm.callbacks.Checkpoint(tmp_path)
    with contextlib.suppress(KeyboardInterrupt):
        make_model().fit(data, callbacks=[callback, StopAfter(1)], verbose=0, **ARRAYS)
    images = weakref.ref(data["images"])
    del data
    gc.collect()
    assert images() is None


@pytest.mark.any_backend
@pytest.mark.slow
def test_killed_at_random_points_and_while_saving(shards, tmp_path):
    rng = random.Random(os.getpid())
    command, folder = (PROGRAM, shards[0].parent / "*.tar"), tmp_path / "killed"
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
        assert process.returncode == -signal.SIGKILL
    ends = []
    for name in ("killed", "whole"):
        run_program(*command, tmp_path / name, tmp_path / f"{name}.npz")
        with np.load(tmp_path / f"{name}.npz") as weights:
            ends.append([*weights.values()])
    assert_same_values(*ends)
    assert not list(folder.glob(".*"))


# === Losses that are not finite ===


@pytest.mark.any_backend
def test_an_epoch_without_a_finite_loss_is_not_saved_and_the_last_one_is_named(
    tmp_path,
):
    for epochs, last in ((1, "none"), (3, r"\S+epoch-00002\.npz")):
        optimizer = keras.optimizers.SGD(np.inf)
        match = rf"which is {last}, with.*Received: loss=nan in epoch {epochs}$"
        with pytest.raises(ValueError, match=match):
            run_plain(tmp_path, epochs, optimizer)
        run_plain(tmp_path, 2)
        assert [*saved_epochs(tmp_path)] == [1, 2]


@pytest.mark.any_backend
def test_keras_stops_at_a_loss_that_is_not_finite(tmp_path):
    data, steps = random_pairs(16), []
    data["images"] = data["images"] / np.float32(64) - 2
    data["images"][5] = np.nan
    stop = keras.callbacks.TerminateOnNaN(raise_error=True)
    note = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: steps.append(batch)
    )
    options = {"epochs": 1, "callbacks": [note, stop], **ARRAYS}
    with pytest.raises(RuntimeError, match="at batch 1"):
        run(data, tmp_path, model=compiled_model(), **options)
    assert steps == [0, 1]
    assert not saved_epochs(tmp_path)


# === Refusals ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("argument", "value"),
    [("save_every", 0), ("keep", 0), ("directory", "nowhere://run")],
)
def test_bad_arguments_are_named(argument, value, tmp_path):
    with pytest.raises(ValueError, match=rf"`{argument}`.*Received: {argument}="):
        kcm.callbacks.Checkpoint(**{"directory": tmp_path, argument: value})


@pytest.mark.any_backend
@pytest.mark.parametrize("path", ["nowhere://run", "best.weights.h5"])
def test_what_is_no_folder_of_checkpoints_is_refused(path):
    match = rf"`resume_from` must.*Received: resume_from='?{path}"
    with pytest.raises(ValueError, match=match):
        compiled_model().fit(random_pairs(4), resume_from=path)


@pytest.mark.any_backend
@pytest.mark.parametrize("content", [b"", b"PK cut off"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "epoch-00002.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"remove this file.*Received: .*00002.npz"):
        run_plain(tmp_path, 1)


@pytest.mark.any_backend
def test_an_error_of_writing_stops_training(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = plain_model()
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space left"):
        run(random_pairs(8), tmp_path, model=model, **ARRAYS)
    assert int(model.optimizer.iterations) == 2


@pytest.mark.any_backend
def test_an_epoch_of_data_that_is_not_found_again_is_refused(tmp_path):
    data = ((x,) for x in [pairs()])
    with pytest.raises(ValueError, match=r"Received: steps_per_epoch=2, data of"):
        run(data, tmp_path, steps_per_epoch=2)


@pytest.mark.any_backend
def test_a_model_that_is_not_compiled_is_refused(whole, folder):
    with pytest.raises(ValueError, match=r"`resume_from` needs a compiled.*Received:"):
        small_model().fit(random_pairs(8), resume_from=folder)


@pytest.mark.any_backend
def test_a_run_from_the_beginning_does_not_write_among_later_checkpoints(
    whole, folder, shards
):
    message = r"`directory` must not.*Received:.*after epoch 3"
    with pytest.raises(ValueError, match=message):
        run(make_dataset(shards), folder, resume_from=folder / "epoch-00001.npz")


def test_averages_swapped_while_they_are_saved_are_refused(tmp_path):
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    with pytest.raises(ValueError, match=r"swap_on_epoch=False.*Received: callbacks"):
        run_plain(tmp_path, 1, keras.optimizers.SGD(0.05, use_ema=True), [swap])
