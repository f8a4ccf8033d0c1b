"""Metrics in the logs of `fit`."""

import contextlib
import gc
import time
import weakref

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data import stream
from tests.helpers import FAST, Batches, random_pairs, tiny_clip

from .training_run import make_dataset, make_model, pairs

BACKEND = keras.backend.backend()


class Clock(keras.callbacks.Callback):
    """A second a step, a minute for the first, an hour for validation."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        self.rows = []

    def on_train_batch_begin(self, batch, logs=None):
        self.now += 60.0 if batch == 0 else 1.0

    def on_test_begin(self, logs=None):
        self.now += 3600.0


class Rows(keras.callbacks.Callback):
    """The logs of each step. Keras waits for each step because of it."""

    def on_train_begin(self, logs=None):
        self.rows = []

    def on_train_batch_end(self, batch, logs=None):
        self.rows.append(dict(logs))


def fit(monkeypatch, count, **options):
    model, rows = make_model(), Rows()
    model.compile("sgd")
    callbacks = [Clock(monkeypatch), kcm.callbacks.Throughput(), rows]
    history = model.fit(
        pairs(count), batch_size=4, verbose=0, callbacks=callbacks, **options
    )
    return history.history, rows.rows


def test_an_epoch_counts_all_its_steps_but_the_first(monkeypatch):
    history, rows = fit(monkeypatch, 24, epochs=2, validation_data=pairs(8))
    assert history["samples_per_second"] == [4.0, 4.0]
    assert [row["samples_per_second"] for row in rows[:3]] == [4 / 60, 4.0, 4.0]


@pytest.mark.any_backend
@pytest.mark.skipif(BACKEND == "tensorflow", reason="reads in a thread of its own")
@pytest.mark.parametrize("processors", [1, 16])
def test_the_time_that_steps_wait_for_data_is_reported_with_a_remedy(
    monkeypatch, write_pairs, capsys, processors
):
    clock, read = Clock(monkeypatch), stream._in_threads

    def slow(*arguments):
        for batch in read(*arguments):
            clock.now += 3.0
            yield batch

    monkeypatch.setattr(stream, "_in_threads", slow)
    monkeypatch.setattr(stream, "num_processors", lambda: processors)
    dataset = make_dataset(write_pairs("a.tar", 0, 48), format="grain")
    model = make_model()
    model.compile("sgd")
    callbacks = [clock, kcm.callbacks.Throughput(), Rows()]
    fit = dict(steps_per_epoch=6, epochs=2, verbose=2, callbacks=callbacks)
    history = model.fit(dataset, **fit).history
    # Keras may read batches before the first epoch.
    np.testing.assert_allclose(history["data_wait"][1], 0.75)
    remedy = "of the time for data: pass `num_workers=4`"
    assert capsys.readouterr().out.count(remedy) == (processors == 16)


@pytest.mark.any_backend
def test_one_step_counts_with_all_its_time(monkeypatch):
    history, _ = fit(monkeypatch, 4)
    np.testing.assert_allclose(history["samples_per_second"], [4 / 60])


@pytest.mark.any_backend
def test_steps_that_are_reported_out_of_order_count_once(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    class Overtake(kcm.callbacks.Throughput):
        """Steps 1 and 0, 3 and 2, and so on, each pair a second after the last."""

        def on_train_batch_begin(self, batch, logs=None):
            if batch % 2 == 1:
                nonlocal now
                now += 1.0
                self.rows = [{}, {}]
                for row, step in zip(self.rows, (batch, batch - 1)):
                    super().on_train_batch_end(step, row)

        def on_train_batch_end(self, batch, logs=None):
            pass

    throughput, rows = Overtake(), Rows()
    model = make_model()
    callbacks = [throughput, rows]
    history = model.fit(pairs(32), batch_size=4, verbose=0, callbacks=callbacks).history
    # 4 pairs a step, two steps a second.
    assert history["samples_per_second"] == [8.0]
    assert [row["samples_per_second"] for row in throughput.rows] == [8.0, 8.0]


@pytest.mark.any_backend
def test_of_data_of_unknown_batches_nothing_is_reported():
    model = make_model()
    model.compile("sgd")
    callbacks = [kcm.callbacks.Throughput()]
    history = model.fit(Batches([pairs(4)] * 2), verbose=0, callbacks=callbacks).history
    assert "samples_per_second" not in history


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["throughput", "checkpoint"])
def test_a_callback_of_an_interrupted_fit_does_not_keep_the_data(kind, tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model, data = make_model(), pairs(8)
    model.compile("sgd")
    callback = kcm.callbacks.Throughput()
    if kind == "checkpoint":
        callback = kcm.callbacks.Checkpoint(tmp_path)
    with contextlib.suppress(KeyboardInterrupt):
        model.fit(data, batch_size=4, verbose=0, callbacks=[callback, Interrupt()])
    images = weakref.ref(data["images"])
    del data
    gc.collect()
    assert images() is None


@pytest.mark.any_backend
def test_counting_tokens_leaves_nothing_in_the_encoder():
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    model.compile("sgd", **FAST)

    def fit():
        throughput = kcm.callbacks.Throughput()
        model.fit(random_pairs(4), batch_size=4, verbose=0, callbacks=[throughput])
        gc.collect()
        # Each layer keeps those of all its calls.
        return sum(isinstance(x, keras.KerasTensor) for x in gc.get_objects())

    assert fit() == fit()


@pytest.mark.any_backend
def test_a_wrong_window_is_named():
    with pytest.raises(ValueError, match=r"`window`.*Received: window=0"):
        kcm.callbacks.Throughput(window=0)
