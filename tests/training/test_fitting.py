"""`fit` of a ContrastiveModel: its arguments, and how it reads streams."""

import multiprocessing
import os
import re
import threading

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.distribution import backends, replicas
from keras_cluster_mask.training.fitting import (
    STEPS_AHEAD,
    TrainingRun,
)
from keras_cluster_mask.training.training_data import TrainingData
from tests.helpers import (
    FAST,
    assert_same_values,
    by_tower,
    compiled_model,
    random_pairs,
    small_model,
    stream,
    values,
)
from tests.training.processes import NoteProcess
from tests.training.training_run import StopAfter

# Sizes may be integers of NumPy.
FIT = dict(batch_size=np.int64(4), shuffle=False, verbose=0)


def compiled():
    keras.utils.set_random_seed(0)
    return compiled_model(keras.optimizers.SGD(0.05, momentum=0.9))


@pytest.mark.any_backend
def test_arguments_have_the_order_of_keras():
    def note(epoch, logs):
        logs["noted"] = 1.0

    found, expected, pairs = compiled(), compiled(), random_pairs(8)
    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=note)]
    history = found.fit(pairs, None, 4, 2, 0, callbacks, 0.0, pairs, False).history
    expected.fit(pairs, epochs=2, **FIT)
    assert_same_values(found.weights, expected.weights)
    assert len(history["val_loss"]) == len(history["noted"]) == 2


def test_a_model_whose_first_step_fails_keeps_its_weights(monkeypatch):
    model, pairs = compiled(), random_pairs(8)
    model.fit(pairs, **FIT)
    before = values([*model.weights, *model.optimizer.variables])

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "call", fails)
        # Of another size, for which the step is compiled again.
        with pytest.raises(RuntimeError, match="out of memory"):
            model.fit(random_pairs(12), batch_size=6, verbose=0)
    after = values([*model.weights, *model.optimizer.variables])
    assert_same_values(after, before)
    # And training continues.
    model.fit(pairs, **FIT)


def checkpoint(folder):
    return kcm.callbacks.Checkpoint(folder, keep=9)


@pytest.mark.any_backend
def test_a_first_epoch_leaves_out_no_data_if_nothing_is_resumed(tmp_path):
    found, expected = compiled(), compiled()
    options = {**FIT, "steps_per_epoch": np.int64(2)}
    options["callbacks"] = [checkpoint(tmp_path)]
    found.fit(random_pairs(8), initial_epoch=np.int64(3), epochs=4, **options)
    expected.fit(random_pairs(8), **FIT)
    assert_same_values(found.weights, expected.weights)


@pytest.mark.one_case
@pytest.mark.parametrize("several", [False, True])
def test_averages_of_weights_can_be_trained_again(several):
    model = small_model()
    optimizer = keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.5)
    if several:
        optimizer = by_tower(model, optimizer, image=keras.optimizers.SGD(0.01))
    model.compile(optimizer, **FAST)
    for _ in range(2):
        model.fit(random_pairs(8), **FIT)
        model.predict(random_pairs(8), verbose=0)
    assert int(values([model.optimizer.iterations])[0]) == 4


# === Streams ===


@pytest.mark.any_backend
@pytest.mark.slow
def test_worker_processes_start_once_for_all_epochs(write_pairs, tmp_path):
    shard, folder = write_pairs("a.tar", 0, 15), tmp_path / "processes"
    folder.mkdir()
    data = stream(shard, tokenizer=NoteProcess(folder), num_workers=1)
    compiled().fit(data, epochs=3, verbose=0)
    started = {path.name for path in folder.iterdir()}
    assert len(started) == 1
    assert str(os.getpid()) not in started
    assert not multiprocessing.active_children()


@pytest.mark.any_backend
def test_fit_prints_how_many_samples_of_an_epoch_are_broken(write_pairs, capsys):
    shard = write_pairs("a.tar", 0, 10, [("x.png", b"-"), ("x.txt", b"no 9")])
    for verbose, expected in ((0, 0), (2, 2)):
        data = stream(shard, max_skipped=0.5)
        with pytest.warns(UserWarning, match="was skipped"):
            compiled().fit(data, epochs=2, steps_per_epoch=3, verbose=verbose)
        printed = capsys.readouterr().out
        assert printed.count("broken samples, <SkippedSamples count=") == expected
    compiled().fit(stream(write_pairs("b.tar", 0, 8)), verbose=2)
    assert "broken" not in capsys.readouterr().out


@pytest.mark.any_backend
def test_the_first_fit_that_prints_anything_begins_with_the_backend(capsys):
    backends.print_backend.cache_clear()
    model, line = compiled(), f"Keras backend: {keras.backend.backend()}"
    for verbose, expected in ((0, 0), (2, 1), (2, 0)):
        model.fit(random_pairs(8), **{**FIT, "verbose": verbose})
        lines = capsys.readouterr().out.splitlines()
        assert lines.count(line) == lines[:1].count(line) == expected


@pytest.mark.one_case
@pytest.mark.parametrize("is_main", [True, False])
def test_evaluation_shows_its_length_in_the_main_process(
    is_main, write_pairs, capsys, monkeypatch
):
    monkeypatch.setattr(replicas, "is_main_process", lambda: is_main)
    data = stream(write_pairs("a.tar", 0, 10), training=False)
    model = compiled()
    for evaluate in (
        model.evaluate,
        model.predict,
        lambda data: kcm.evaluation.embed(model, data),
        lambda data: kcm.evaluation.evaluate_retrieval(model, data),
    ):
        evaluate(data)
        printed = capsys.readouterr().out
        assert bool(re.search("3/3|10/10", printed)) == is_main
        assert "Unknown" not in printed
        assert bool(printed) == is_main


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("second", ["initial_epoch", "resume_from"])
def test_a_stream_that_is_fitted_again_continues_where_it_was(
    second, write_pairs, tmp_path
):
    shard = write_pairs("a.tar", 0, 12)
    model, expected, data = compiled(), compiled(), stream(shard)
    expected.fit(stream(shard), epochs=3, verbose=0)
    model.fit(data, epochs=2, verbose=0, callbacks=[checkpoint(tmp_path)])
    again = {"initial_epoch": 2, "resume_from": tmp_path}[second]
    model.fit(data, epochs=3, verbose=0, **{second: again})
    assert_same_values(model.weights, expected.weights)


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras takes single steps there."
)
def test_executions_that_do_not_divide_an_epoch_are_refused():
    model = small_model()
    model.compile("sgd", **FAST, steps_per_execution=2)
    match = r"`steps_per_execution` must divide.*=2, epochs of 5 steps$"
    with pytest.raises(ValueError, match=match):
        model.fit(random_pairs(20), batch_size=4, verbose=0)
    model.fit(random_pairs(16), batch_size=4, epochs=2, verbose=0)
    assert int(model.optimizer.iterations) == 8


def test_a_fit_after_the_end_of_the_schedule_warns_that_it_learns_nothing():
    model = small_model()
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 3)
    model.compile(keras.optimizers.SGD(schedule), **FAST)
    model.fit(random_pairs(16), **FIT)
    before = values(model.trainable_weights)
    with pytest.warns(UserWarning, match=r"reaches 0 before.*Received.* of 2 steps$"):
        model.fit(random_pairs(8), **FIT)
    assert_same_values(model.trainable_weights, before)


@pytest.mark.any_backend
@pytest.mark.parametrize(("steps", "warns"), [(9, True), (12, False), (20_000, False)])
def test_a_schedule_of_fewer_steps_than_the_fit_warns_before_it(steps, warns, recwarn):
    model = small_model()
    # The warm-up starts at 0, too.
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - 1, warmup_target=0.1, warmup_steps=1
    )
    model.compile(by_tower(model, "sgd", image=keras.optimizers.SGD(schedule)))
    fit = {**FIT, "epochs": max(3, steps // 4), "callbacks": [StopAfter(1)]}
    with pytest.raises(KeyboardInterrupt):
        model.fit(random_pairs(16), **fit)
    found = [x for x in recwarn if "reaches 0 before the end" in str(x.message)]
    assert len(found) == warns


@pytest.mark.any_backend
def test_a_dataset_for_evaluation_is_not_trained_on(write_pairs):
    data = stream(write_pairs("a.tar", 0, 12), training=False)
    with pytest.raises(ValueError, match=r"`training=True`\. Received: x=<ImageText"):
        compiled().fit(data, verbose=0)


@pytest.mark.one_case
@pytest.mark.filterwarnings("ignore:.*was skipped")
def test_validation_data_is_read_again_when_it_is_due(write_pairs):
    # All samples of the last batch are broken.
    shard = write_pairs("a.tar", 0, 8, [("x.png", b"-"), ("x.txt", b"no 9")])
    held_out = stream(shard, training=False, max_skipped=1.0)
    model, pairs = compiled(), random_pairs(8)
    for frequency, expected in ((1, 4), (2, 2), ([3, 4], 2)):
        options = dict(validation_data=held_out, validation_freq=frequency)
        history = model.fit(pairs, epochs=4, **options, **FIT).history
        assert len(history["val_loss"]) == expected
    logs = model.evaluate(held_out, verbose=0, return_dict=True)
    assert history["val_loss"][-1] == pytest.approx(logs["loss"])


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("validation_freq", 0),
        ("validation_freq", "2"),
        ("validation_steps", 0),
        # It is not the default.
        ("batch_size", 0),
    ],
)
def test_numbers_are_checked_before_training(name, value):
    options = {"validation_data": random_pairs(4), **FIT, name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must.*Received: {name}="):
        compiled().fit(random_pairs(8), **options)


@pytest.mark.any_backend
def test_a_generator_is_validated_once():
    model, held_out = compiled(), ((random_pairs(4),) for _ in range(2))
    options = dict(FIT, epochs=2, validation_data=held_out)
    with pytest.raises(ValueError, match=r"`validation_data` must.*after each epoch"):
        model.fit(random_pairs(8), **options)
    history = model.fit(random_pairs(8), validation_freq=2, **options).history
    assert len(history["val_loss"]) == 1


@pytest.mark.one_case
def test_callbacks_see_the_validation_and_its_metrics():
    seen = []

    class See(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen.append(self.params["epochs"])

        def on_epoch_end(self, epoch, logs=None):
            seen.append(logs["val_loss"])

    pairs = random_pairs(8)
    options = dict(validation_data=pairs, callbacks=[See()], epochs=2)
    history = compiled().fit(pairs, **options, **FIT).history
    first, second = history["val_loss"]
    assert seen == [2, first, 2, second]


# === Steps that begin before others end ===


class Note(keras.callbacks.Callback):
    """Notes in which threads it is told of the ends of steps."""

    async_safe = True

    def __init__(self):
        super().__init__()
        self.threads = set()

    def on_train_batch_end(self, batch, logs=None):
        self.threads.add(threading.current_thread().name)


@pytest.mark.one_case
@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_no_step_is_waited_for_whatever_is_shown_and_saved(
    verbose, saves, tmp_path, capsys
):
    note = Note()
    callbacks = [note, *([kcm.callbacks.Checkpoint(tmp_path)] if saves else [])]
    fit = dict(batch_size=2, epochs=2, verbose=verbose, callbacks=callbacks)
    compiled_model().fit(random_pairs(40), **fit)
    main = threading.main_thread().name
    # Keras for TensorFlow reads the logs of each step.
    assert (main in note.threads) == (keras.backend.backend() == "tensorflow")
    shown = capsys.readouterr().out
    if verbose == 1:
        for text in ("Epoch 2/2", "20/20", "loss:", "accuracy:"):
            assert text in shown
    assert shown.count("\n") == 4 * bool(verbose)


@pytest.mark.any_backend
def test_few_steps_begin_before_others_end():
    model = small_model()
    data = TrainingData(random_pairs(8), model.input_rules, 4)
    run = TrainingRun(model, data, [], None)
    run.set_model(model)
    for step in range(STEPS_AHEAD):
        run.on_train_batch_begin(step)
    one_more = threading.Thread(target=run.on_train_batch_begin, args=(STEPS_AHEAD,))
    one_more.start()
    one_more.join(0.2)
    assert one_more.is_alive()
    run.on_train_batch_end(0)
    one_more.join(5)
    assert not one_more.is_alive()


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [kcm.callbacks.Checkpoint, kcm.callbacks.Evaluate])
def test_callbacks_refuse_the_fit_of_another_model(make, tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(
        ValueError, match=r"must be in.*Received: `fit` of a Sequential"
    ):
        model.fit(np.ones((4, 2)), np.ones(4), verbose=0, callbacks=[make(tmp_path)])
