"""Metrics of an evaluation in the logs of `fit`."""

import math

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.callbacks import Evaluate, Retrieval, ZeroShot
from keras_cluster_mask.callbacks import evaluation as evaluation_module
from keras_cluster_mask.evaluation import evaluate_retrieval, evaluate_zero_shot
from tests.helpers import (
    assert_same_values,
    compiled_model,
    random_pairs,
)
from tests.helpers import letters_as_tokens as tokenizer
from tests.models.conftest import seeded  # noqa: F401
from tests.training.training_run import make_model, pairs, weights_of

RECALL = "val_image_to_text_recall@1"
NAMES = ["red", "green", "blue"]


def without_averages():
    return make_model(optimizer=keras.optimizers.Adam(0.02))


def fit(callbacks, model=None, verbose=0, **options):
    model = model or without_averages()
    if "x" not in options:
        options.update(x=pairs(), batch_size=6, shuffle=False)
    history = model.fit(callbacks=callbacks, verbose=verbose, **options)
    return model, history.history


@pytest.fixture(scope="module")
def small():
    """A model that trains fast, for callbacks that care for the logs alone."""
    return compiled_model()


def log(small, *callbacks, **options):
    """The history of training with scripted metrics."""
    options = dict(x=random_pairs(4), batch_size=4, **options)
    return fit(callbacks, small, **options)[1]


def scripted(values, **options):
    """Finds what it is told, one value an evaluation."""
    values = iter(values)
    return Evaluate(lambda model: {"score": next(values)}, **options)


# === What is evaluated ===


@pytest.mark.one_case
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_metrics_are_those_of_the_weights_at_the_end_of_the_epoch(dtype):
    keras.config.set_dtype_policy(dtype)
    labeled = {"images": pairs(9, 2)["images"], "labels": np.arange(9) % 3}
    captioned = {"images": pairs(4)["images"], "captions": [["a", "b"], "c", "d", "e"]}
    retrieval = {"data": pairs(8, 1), "ks": (1, 3)}
    coco = dict(data=captioned, tokenizer=tokenizer, ks=2, duplicates="negative")
    zero_shot = dict(data=labeled, class_names=NAMES, tokenizer=tokenizer, ks=(1, 2))
    uses = [
        (Retrieval(**retrieval), evaluate_retrieval, retrieval, "val_"),
        (Retrieval(**coco, name="coco"), evaluate_retrieval, coco, "val_coco_"),
        (ZeroShot(**zero_shot), evaluate_zero_shot, zero_shot, "val_zero_shot_"),
    ]
    model = without_averages()
    before = evaluate_retrieval(model, **retrieval, verbose=0)
    before.pop("chance")
    callbacks = [callback for callback, *_ in uses]
    _, history = fit(callbacks, model, validation_data=pairs(6, 3))
    for callback, evaluate, options, prefix in uses:
        after = evaluate(model, **options, verbose=0)
        chance = after.pop("chance", {}).values()
        assert [*callback.chance.values()] == [*chance]
        for name, value in after.items():
            assert history[f"{prefix}{name}"] == [value]
    assert any(history[f"val_{name}"] != [x] for name, x in before.items())
    assert "val_loss" in history


@pytest.mark.any_backend
def test_chance_is_printed_once_and_not_logged(small, capsys):
    def evaluate(model):
        return evaluate_retrieval(model, random_pairs(8), ks=2, verbose=0)

    history = log(small, Evaluate(evaluate, name="own"), epochs=2, verbose=2)
    printed = capsys.readouterr().out
    assert printed.count("Chance: own_image_to_text_recall@2 0.25, own_") == 1
    assert sum("recall" in name for name in history) == 2
    log(small, Evaluate(evaluate))
    assert "Chance" not in capsys.readouterr().out
    # A metric of this name.
    history = log(small, Evaluate(lambda model: {"chance": 0.5}), verbose=2)
    assert history["val_chance"] == [0.5]


@pytest.mark.any_backend
def test_data_is_read_again_for_each_evaluation(small):
    class Batches:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from [random_pairs(0), random_pairs(5), random_pairs(3)]

    batches = Batches()
    history = log(small, Retrieval(batches, ks=7), epochs=2)
    # Once to look at the first batch.
    assert batches.passes == 3
    assert len(history["val_image_to_text_recall@7"]) == 2


@pytest.mark.any_backend
@pytest.mark.parametrize("is_swapped", [True, False])
def test_averages_are_evaluated_once_they_are_swapped_in(is_swapped):
    def embed(model):
        found = kcm.evaluation.embed(model, pairs(4)["images"], verbose=0)
        embeddings.append(found["image_embeddings"])
        return {}

    embeddings = []
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    callbacks = [*[swap] * is_swapped, Evaluate(embed)]
    model, _ = fit(callbacks, make_model(), epochs=2)
    # `fit` ends with the averages in the model.
    embed(model)
    *_, evaluated, at_end = embeddings
    distance = np.abs(evaluated - at_end).max()
    assert distance < 1e-5 if is_swapped else distance > 1e-3


@pytest.mark.any_backend
def test_a_function_may_call_all_functions_of_evaluation():
    evaluation, images = kcm.evaluation, pairs(6)["images"]
    labeled = images, np.arange(6) % 3
    captioned = {"images": images, "captions": list("abcdef")}
    options = {"tokenizer": tokenizer, "verbose": 0}

    def evaluate(model):
        evaluation.zero_shot_classifier(model, NAMES, **options)
        evaluation.embed(model, captioned, **options)
        evaluation.embed_texts(model, NAMES, **options)
        evaluation.evaluate_retrieval(model, captioned, **options)
        return evaluation.evaluate_zero_shot(model, labeled, NAMES, **options)

    model, history = fit([Evaluate(evaluate, name="all")])
    assert history["val_all_top_1"] == [evaluate(model)["top_1"]]


# === What training makes of it ===


@pytest.mark.slow_to_compile
def test_training_is_bit_for_bit_the_same():
    # With dropout, noise for masks, a threshold that moves, averages, a schedule.
    def trained(callbacks):
        fits = dict(epochs=3, validation_data=pairs(6, 3))
        model, history = fit(callbacks, make_model(), **fits)
        return weights_of(model), history["loss"]

    labeled = pairs(9, 2)["images"], np.arange(9) % 3
    callbacks = [Retrieval(pairs(8, 1)), ZeroShot(labeled, NAMES, tokenizer)]
    (found, found_loss), (expected, loss) = trained(callbacks), trained([])
    assert found_loss == loss
    assert_same_values(found, expected)


# === Epochs that are not evaluated ===


@pytest.mark.any_backend
def test_the_first_the_last_and_each_so_many_epochs_are_evaluated(small):
    values = [0.1, 0.3, 0.2, 0.6]
    # Epochs 1, 3, 6 and, as the last one, 7.
    history = log(small, scripted(values, every=3), epochs=7)
    assert history["val_score"] == [0.1, 0.1, 0.3, 0.3, 0.3, 0.2, 0.6]


@pytest.mark.any_backend
def test_an_epoch_at_whose_end_training_stops_is_evaluated(small):
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(small, "stop_training", epoch == 1)
    )
    history = log(small, stop, scripted([0.1, 0.4], every=9), epochs=9)
    assert history["val_score"] == [0.1, 0.4]


@pytest.mark.any_backend
def test_a_model_whose_loss_is_not_finite_is_not_evaluated():
    # The only step of the first epoch breaks the weights.
    model = make_model(optimizer=keras.optimizers.SGD(math.inf))
    callbacks = [keras.callbacks.TerminateOnNaN(), scripted([0.1])]
    _, history = fit(callbacks, model, x=pairs(), epochs=4)
    np.testing.assert_array_equal(history["val_score"], [0.1, math.nan])


# === Processes ===


@pytest.mark.any_backend
def test_all_processes_have_the_metrics_of_the_main_one(small, monkeypatch):
    monkeypatch.setattr(
        evaluation_module,
        "all_gather_object",
        lambda value: [[0.25, 0.5], value],
    )
    history = log(small, Evaluate(lambda model: {"one": 0.1, "other": 0.2}))
    assert (history["val_one"], history["val_other"]) == ([0.25], [0.5])


# === Wrong input ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retrieval(pairs()["images"]), "`data` must contain .token_ids."),
        (lambda: Retrieval([]), "`data` must contain at least one image"),
        (lambda: ZeroShot(pairs(), NAMES, tokenizer), "`data` must contain 'labels'"),
        (lambda: [Retrieval(pairs()), Retrieval(pairs(8))], "`name` must distinguish"),
        (lambda: Retrieval(iter([pairs()])), "`data` must be readable"),
        (lambda: Retrieval(pairs(), every=0), "`every`"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error_before_training(make, message):
    model = without_averages()
    with pytest.raises(ValueError, match=rf"{message}[\s\S]*Received: "):
        fit([make()], model)
    assert int(model.optimizer.iterations) == 0


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("found", "message"),
    [
        (0.5, "`function` must return"),
        ({"score": "0.5"}, "`function` must return"),
        ({"loss": 0.5}, "`name` must distinguish"),
    ],
)
def test_wrong_functions_and_names_in_use_are_errors(small, found, message):
    with pytest.raises(ValueError, match=rf"{message}[\s\S]*Received: "):
        log(small, Evaluate(lambda model: found), validation_data=random_pairs(4))


@pytest.mark.any_backend
def test_one_callback_serves_one_fit_after_another_and_other_models():
    retrieval = Retrieval(pairs(8, 1))
    model, _ = fit([retrieval])
    for each in (model, without_averages()):
        _, history = fit([retrieval], each)
        expected = evaluate_retrieval(each, pairs(8, 1), verbose=0)
        assert history[RECALL][-1] == expected["image_to_text_recall@1"]
