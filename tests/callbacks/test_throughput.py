"""Metrics in the logs of `fit`."""

import contextlib
import gc
import time
import weakref

import keras
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data import batches
from tests.helpers import Batches
from tests.training.training_run import StopAfter, make_dataset, make_model, pairs

BACKEND = keras.backend.backend()


class Clock(keras.callbacks.Callback):
    """A second a step, a minute for the first, an hour for validation."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def on_train_batch_begin(self, batch, logs=None):
        self.now += 60.0 if batch == 0 else 1.0

    # Keras waits for each step because of it.
    def on_train_batch_end(self, batch, logs=None):
        pass

    def on_test_begin(self, logs=None):
        self.now += 3600.0


def fit(*callbacks, x, **options):
    model = make_model()
    model.compile("sgd")
    return model.fit(x, verbose=0, callbacks=callbacks, **options).history


@pytest.mark.parametrize(("steps", "expected"), [(6, 4.0), (1, 4 / 60)])
def test_an_epoch_counts_all_its_steps_but_the_first(monkeypatch, steps, expected):
    callbacks = Clock(monkeypatch), kcm.callbacks.Throughput()
    options = {"batch_size": 4, "epochs": 2, "validation_data": pairs(8)}
    history = fit(*callbacks, x=pairs(4 * steps), **options)
    assert history["samples_per_second"] == pytest.approx([expected, expected])
    assert "data_wait" not in history


@pytest.mark.any_backend
@pytest.mark.skipif(BACKEND == "tensorflow", reason="reads in a thread of its own")
def test_the_share_of_time_that_the_program_waits_for_data(monkeypatch, write_pairs):
    clock, read = Clock(monkeypatch), batches.Batches.in_threads

    def slow(*arguments):
        for batch in read(*arguments):
            clock.now += 3.0
            yield batch

    monkeypatch.setattr(batches.Batches, "in_threads", slow)
    dataset = make_dataset(write_pairs("a.tar", 0, 24))
    callbacks = clock, kcm.callbacks.Throughput()
    history = fit(*callbacks, x=dataset, steps_per_epoch=6, epochs=2)
    # Keras may read batches before the first epoch.
    assert history["data_wait"][1] == pytest.approx(0.75)
    assert history["samples_per_second"][1] == pytest.approx(8 / 4)


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
                for step in (batch, batch - 1):
                    super().on_train_batch_end(step)

        def on_train_batch_end(self, batch, logs=None):
            pass

    history = fit(Overtake(), x=pairs(32), batch_size=4)
    # 4 pairs a step, two steps a second.
    assert history["samples_per_second"] == [8.0]


@pytest.mark.any_backend
def test_of_data_of_unknown_batches_nothing_is_reported():
    history = fit(kcm.callbacks.Throughput(), x=Batches([pairs(4)] * 2))
    assert "samples_per_second" not in history


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make", [lambda folder: kcm.callbacks.Throughput(), kcm.callbacks.Checkpoint]
)
def test_a_callback_of_an_interrupted_fit_does_not_keep_the_data(make, tmp_path):
    data = pairs(8)
    callback = make(tmp_path)
    with contextlib.suppress(KeyboardInterrupt):
        fit(callback, StopAfter(1), x=data, batch_size=4)
    images = weakref.ref(data["images"])
    del data
    gc.collect()
    assert images() is None
