"""Each tower has an optimizer of its own, and all gradients are clipped by one norm."""

import zipfile

import h5py
import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    assert_same_values,
    ids_of,
    random_pairs,
    reloaded,
    to_numpy,
    values,
)
from tests.training.test_optimizers import (
    DECAY,
    RATE,
    adamw,
    assert_same_weights,
    fit,
    make_model,
    train_by_torch,
)


def rates_of(model, image, text, default):
    towers = {id(v): image for v in model.image_encoder.weights}
    towers |= {id(v): text for v in model.text_encoder.weights}
    return [towers.get(id(v), default) for v in model.trainable_variables]


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("eager", "clip"),
    [(True, 0.5), (False, 0.5), (False, None)],
    ids=["eager", "compiled", "unclipped"],
)
def test_towers_learn_at_their_rates_as_in_parameter_groups_of_torch(eager, clip):
    model, reference = make_model(), make_model()
    rates = {"image": RATE / 10, "text": 2 * RATE, "default": RATE}
    optimizer = kcm.TowerOptimizer(
        **{k: adamw(rate) for k, rate in rates.items()}, global_clipnorm=clip
    )
    model.compile(
        optimizer, decay_vectors=True, log_gradient_norm=True, run_eagerly=eager
    )
    history = fit(model)
    rates = rates_of(reference, **rates)
    assert len({*rates}) == 3
    norms = train_by_torch(reference, rates, [DECAY] * len(rates), clip)
    assert_same_weights(model, reference)
    # It had something to do, by the norm of both towers together.
    assert min(norms) > (clip or 0)
    assert history["gradient_norm"] == pytest.approx([np.mean(norms)], rel=1e-5)


@pytest.mark.one_case
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_norm_that_clips_is_that_of_gradients_without_the_scale_of_the_loss(scale):
    model = make_model()
    before = values(model.trainable_weights)
    optimizer = kcm.TowerOptimizer(
        keras.optimizers.SGD(1.0), global_clipnorm=0.5, loss_scale_factor=scale
    )
    model.compile(optimizer, **FAST)
    fit(model, steps=1)
    after = values(model.trainable_weights)
    length = np.sqrt(sum(((x - y) ** 2).sum() for x, y in zip(after, before)))
    assert length == pytest.approx(0.5, rel=1e-5)


@pytest.mark.any_backend
def test_towers_may_have_weights_of_the_same_paths():
    def encoder(shape):
        inputs = keras.Input(shape)
        flat = keras.layers.Flatten()(inputs)
        return keras.Model(inputs, keras.layers.Dense(4, name="dense")(flat))

    model = kcm.ContrastiveModel(encoder((8, 8, 3)), encoder((6,)))
    assert model.image_encoder.weights[0].path == model.text_encoder.weights[0].path
    still, moving = keras.optimizers.SGD(0.0), keras.optimizers.SGD(0.1)
    model.compile(kcm.TowerOptimizer(still, image=moving), **FAST)
    before = values(model.weights)
    pairs = random_pairs(4)
    pairs["images"] = pairs["images"][:, :8, :8]
    model.fit(pairs, verbose=0)
    image = ids_of(model.image_encoder.weights)
    for old, weight in zip(before, model.weights):
        moved = bool((old != to_numpy(weight)).any())
        assert moved == (id(weight) in image), weight.path


@pytest.mark.any_backend
def test_a_norm_to_clip_by_is_positive():
    with pytest.raises(ValueError, match=r"`global_clipnorm` must.*Received: "):
        kcm.TowerOptimizer("sgd", global_clipnorm=-1.0)


@pytest.mark.any_backend
def test_a_model_without_towers_is_refused():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(kcm.TowerOptimizer(adamw(0.4), image=adamw(0.2)), "mse", **FAST)
    with pytest.raises(ValueError, match=r"`TowerOptimizer`.*Received: .*kernel"):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


def test_callbacks_change_the_rate_of_each_tower_under_loss_scaling(tmp_path):
    optimizer = kcm.TowerOptimizer(adamw(0.4), image=adamw(0.2))
    model = make_model()
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer), **FAST)
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    history = fit(model, callbacks=[halve])
    rates = [float(to_numpy(x.learning_rate)) for x in optimizer.optimizers]
    assert sorted(rates) == pytest.approx([0.1, 0.2])
    assert sum(name.startswith("learning_rate") for name in history) == 2
    loaded = reloaded(model, tmp_path).optimizer
    assert_same_values(loaded.variables, model.optimizer.variables)


def test_a_file_has_the_state_of_each_optimizer_once(tmp_path):
    model, pairs = make_model(), random_pairs(8)
    model.compile(
        kcm.TowerOptimizer(
            keras.optimizers.Adam(1e-3), image=keras.optimizers.Adam(1e-4)
        )
    )
    model.fit(pairs, batch_size=4, verbose=0)
    loaded = reloaded(model, tmp_path)
    assert loaded.optimizer.iterations == 2
    assert_same_values(loaded.optimizer.variables, model.optimizer.variables)
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        path = file.extract("model.weights.h5", tmp_path)
    sizes = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, x: sizes.update({name: getattr(x, "size", 0)}))
    saved = sum(size for name, size in sizes.items() if name.startswith("optimizer/"))
    assert saved == sum(int(np.prod(v.shape)) for v in model.optimizer.variables)
