"""Steps that begin before others end, the progress bar, and other models."""

import threading

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.training.fitting import (
    STEPS_AHEAD,
    ProgressBar,
    TrainingRun,
)
from keras_cluster_mask.training.training_data import TrainingData
from tests.helpers import (
    compiled_model,
    masked_vit,
    random_pairs,
    small_model,
    text_bag,
)

BACKEND = keras.backend.backend()


class Note(keras.callbacks.Callback):
    """Notes in which threads it is told of the ends of steps."""

    async_safe = True

    def __init__(self):
        super().__init__()
        self.threads = set()

    def on_train_batch_end(self, batch, logs=None):
        self.threads.add(threading.current_thread().name)


def fit(*callbacks, verbose):
    callbacks = [kcm.callbacks.Throughput(), *callbacks]
    fit = dict(batch_size=2, epochs=2, verbose=verbose)
    compiled_model().fit(random_pairs(40), callbacks=callbacks, **fit)


@pytest.mark.one_case
@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_no_step_is_waited_for_whatever_is_shown_and_saved(verbose, saves, tmp_path):
    note = Note()
    others = [kcm.callbacks.Checkpoint(tmp_path)] if saves else []
    fit(note, *others, verbose=verbose)
    main = threading.main_thread().name
    # Keras for TensorFlow reads the logs of each step.
    assert (main in note.threads) == (BACKEND == "tensorflow")


@pytest.mark.any_backend
def test_few_steps_begin_before_others_end():
    model = small_model()
    run = TrainingRun(model, TrainingData(random_pairs(8), model.input_rules, 4))
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
def test_progress_shows_all_steps_and_metrics(capsys):
    fit(Note(), verbose=1)
    shown = capsys.readouterr().out
    for text in ("Epoch 2/2", "20/20", "loss:", "samples_per_second:"):
        assert text in shown
    assert shown.count("\n") == 4


@pytest.mark.any_backend
@pytest.mark.parametrize("varies", [False, True])
def test_progress_with_validation_fits_120_characters(varies, capsys):
    hides = dict(min_mask_ratio=0.25, threshold=0.1) if varies else {}
    masking = kcm.ClusterMasking(4, **hides)
    bar = ProgressBar()
    bar.set_model(kcm.ContrastiveModel(masked_vit(masking), text_bag()))
    bar.set_params({"verbose": 1, "epochs": 1, "steps": 190})
    names = "loss", "image_to_text_accuracy", "text_to_image_accuracy", "temperature"
    logs = {name: 1.2345 + i for i, name in enumerate(names)}
    logs |= {"mask_ratio": 0.5, **{f"val_{name}": x for name, x in logs.items()}}
    bar.on_train_begin()
    bar.on_epoch_begin(0)
    bar.on_epoch_end(0, logs)
    line = capsys.readouterr().out.strip()
    metrics = line[line.index(" - ") :]
    expected = "loss: 1.2345", "acc: 2.7345", "val_loss: 1.2345", "val_acc: 2.7345"
    assert {*metrics.split(" - ")[1:]} == {*expected, *["mask_ratio: 0.5000"] * varies}
    if not varies:
        longest = "1234/1234 ━━━━━━━━━━━━━━━━━━━━ 1234s 1234ms/step"
        assert len(longest + metrics) <= 120


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: kcm.callbacks.Throughput(),
        lambda folder: kcm.callbacks.Checkpoint(folder),
        lambda folder: kcm.callbacks.Retrieval(random_pairs(4)),
    ],
    ids=["Throughput", "Checkpoint", "Retrieval"],
)
def test_callbacks_refuse_the_fit_of_another_model(make, tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    callback = make(tmp_path)
    message = f"`{type(callback).__name__}` must be in.*Received: `fit` of a Sequential"
    with pytest.raises(ValueError, match=message):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[callback])
