"""What weight decay spares."""

import keras
import numpy as np
import pytest
import torch

import keras_cluster_mask as kcm
from keras_cluster_mask.training.optimizers import is_vector
from tests.encoders.test_pooled import bert
from tests.helpers import (
    FAST,
    GradientSteps,
    assert_close,
    assert_same_values,
    by_tower,
    dino_encoder,
    functional_vit,
    largest_error,
    random_pairs,
    small_model,
    split,
    text_bag,
    tiny_clip,
    to_numpy,
    values,
)

BATCH, STEPS = 8, 4
RATE, DECAY = 0.01, 0.3


def make_model(**kwargs):
    keras.utils.set_random_seed(0)
    return small_model(projection_dim=8, **kwargs)


def batches():
    return split(random_pairs(BATCH * STEPS), BATCH)


def fit(model, epochs=1, steps=STEPS, callbacks=()):
    pairs = random_pairs(BATCH * steps)
    fit = dict(batch_size=BATCH, shuffle=False, epochs=epochs, verbose=0)
    return model.fit(pairs, callbacks=[*callbacks], **fit).history


def train_by_torch(model, rates, decays, clip=None):
    """Trains a Keras model by `torch.optim.AdamW`, with a parameter group a weight.

    Returns:
        The norms of the gradients of the steps.
    """
    variables, gradients_of = model.trainable_variables, GradientSteps(model)
    weights = [torch.nn.Parameter(torch.tensor(to_numpy(v))) for v in variables]
    groups = [
        {"params": [weight], "lr": rate, "weight_decay": decay}
        for weight, rate, decay in zip(weights, rates, decays)
    ]
    optimizer, norms = torch.optim.AdamW(groups, eps=1e-12), []
    for pairs in batches():
        for weight, gradient in zip(weights, gradients_of(pairs)[1]):
            weight.grad = torch.tensor(gradient)
        norm = torch.nn.utils.clip_grad_norm_(weights, clip or np.inf)
        norms.append(float(norm))
        optimizer.step()
        for variable, weight in zip(variables, weights):
            variable.assign(weight.detach().numpy())
    return norms


def assert_same_weights(model, reference):
    found, expected = model.trainable_variables, reference.trainable_variables
    assert_close(found, expected, atol=2e-5, rtol=2e-4)


def adamw(rate=RATE, **kwargs):
    return keras.optimizers.AdamW(rate, weight_decay=DECAY, epsilon=1e-12, **kwargs)


# === What decays ===


@pytest.mark.one_case
@pytest.mark.parametrize("decay_vectors", [False, True])
def test_weight_decay_spares_biases_and_vectors_unless_told_otherwise(decay_vectors):
    keras.utils.set_random_seed(0)
    model = kcm.ContrastiveModel(functional_vit(), text_bag(), loss="sigmoid")
    pairs = random_pairs(BATCH)
    before = values(model.trainable_variables)
    _, gradients = GradientSteps(model)(pairs)
    model.compile(
        keras.optimizers.SGD(RATE, weight_decay=DECAY),
        decay_vectors=decay_vectors,
        **FAST,
    )
    model.fit(pairs, batch_size=BATCH, shuffle=False, verbose=0)
    spared = 0
    for variable, weight, gradient in zip(model.trainable_variables, before, gradients):
        # The biases of attention are matrices by shape, (heads, width of a head).
        spares = "bias" in variable.path or weight.ndim < 2
        decay = 0.0 if spares and not decay_vectors else DECAY
        np.testing.assert_allclose(
            to_numpy(variable),
            weight * (1 - RATE * decay) - RATE * gradient,
            rtol=1e-4,
            atol=1e-5,
            err_msg=variable.path,
        )
        spared += spares
    assert 0 < spared < len(before)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("shape", "name", "expected"),
    [
        ((), "logit_scale", True),
        ((1, 1, 8), "class_token", True),
        ((2, 4), "bias", True),
        ((8, 1), "kernel", False),
        ((1, 16, 8), "position_embedding", False),
    ],
)
def test_what_a_vector_is(shape, name, expected):
    assert is_vector(keras.Variable(np.zeros(shape), name=name)) == expected


@pytest.mark.any_backend
def test_what_an_optimizer_excludes_already_stays_excluded():
    model = make_model()
    kept = model.image_tower.projection.kernel
    optimizer = keras.optimizers.SGD(0.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay([kept], ["embeddings"])
    model.compile(optimizer)
    optimizer.learning_rate = 1e-9
    optimizer.build(model.trainable_variables)
    decaying = [v for v in model.trainable_variables if optimizer._use_weight_decay(v)]
    assert {v.name for v in decaying} == {"kernel"}
    assert len(decaying) == 3
    assert all(v is not kept for v in decaying)


@pytest.mark.any_backend
def test_an_optimizer_of_vectors_alone_decays_nothing():
    trained = []
    for decay in (None, 0.5):
        model = make_model()
        model.image_encoder.trainable = model.text_encoder.trainable = False
        model.image_tower.projection.trainable = False
        model.text_tower.projection.trainable = False
        model.compile(keras.optimizers.SGD(RATE, weight_decay=decay), **FAST)
        fit(model, steps=1)
        trained.append(values(model.trainable_variables))
    assert trained[0]
    assert_same_values(*trained)
    # The weights of another part decay, and the optimizer is compiled again when built.
    model.image_encoder.trainable = True
    default, image = (keras.optimizers.SGD(RATE, weight_decay=0.5) for _ in range(2))
    optimizer = by_tower(model, default, image=image)
    for _ in range(2):
        model.compile(optimizer, **FAST)
        fit(model, steps=1)


@pytest.mark.any_backend
@pytest.mark.parametrize("decay_vectors", [False, True])
def test_an_optimizer_keeps_the_decay_that_it_was_compiled_with(decay_vectors):
    model = make_model()
    optimizer = adamw()
    for _ in range(2):
        model.compile(optimizer, decay_vectors=decay_vectors)
        optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"must be new.*`decay_vectors`.*Received: "):
        model.compile(optimizer, decay_vectors=not decay_vectors)
    # One that decays nothing.
    adam = keras.optimizers.Adam()
    for other in (decay_vectors, not decay_vectors):
        model.compile(adam, decay_vectors=other)


@pytest.mark.any_backend
def test_a_model_without_weights_is_refused_until_it_is_built_if_weights_decay():
    encoder = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(16)])
    model = kcm.ContrastiveModel(encoder, text_bag())
    with pytest.raises(ValueError, match=r"call it on a batch first.*Received: "):
        model.compile(adamw())
    model.compile(adamw(), decay_vectors=True)
    model.compile("adam")
    model(random_pairs(2))
    model.compile(adamw(), **FAST)
    fit(model, steps=1)
    decaying = filter(model.optimizer._use_weight_decay, model.trainable_weights)
    assert {v.name for v in decaying} == {"embeddings", "kernel"}


@pytest.mark.any_backend
@pytest.mark.parametrize("several", [False, True])
def test_an_optimizer_that_another_model_used_is_refused(several):
    model, other, optimizer = small_model(), small_model(), adamw()
    if several:
        optimizer = by_tower(model, optimizer, image=adamw())
    model.compile(optimizer)
    optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"the weights .*Received: .* others"):
        other.compile(optimizer)


# === Frozen towers ===


@pytest.mark.one_case
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_frozen_tower_stays_as_it_is_while_the_other_learns(micro_batch_size):
    model, reference = (
        make_model(micro_batch_size=x) for x in (micro_batch_size, None)
    )
    for each in (model, reference):
        each.image_encoder.trainable = False
    frozen = values(model.image_encoder.weights)
    model.compile(adamw(use_ema=True, ema_momentum=0.0, global_clipnorm=0.5))
    fit(model)
    assert_same_values(model.image_encoder.weights, frozen)
    spared = [is_vector(v) for v in reference.trainable_variables]
    decays = [0.0 if x else DECAY for x in spared]
    norms = train_by_torch(reference, [RATE] * len(spared), decays, clip=0.5)
    assert_same_weights(model, reference)
    assert min(norms) > 0.5  # There was something to clip.


# === Loss scaling ===


@pytest.mark.any_backend
def test_a_loss_scale_optimizer_spares_vectors():
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.2)
    model = make_model()
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer), **FAST)
    fit(model, steps=1)
    decaying = filter(optimizer._use_weight_decay, model.trainable_variables)
    assert {v.name for v in decaying} == {"embeddings", "kernel"}


def test_averages_start_with_the_first_step_that_is_not_skipped():
    found = []
    for use_ema in (False, True):
        model = make_model()
        images, others = (keras.optimizers.SGD(0.05, use_ema=use_ema) for _ in range(2))
        optimizer = by_tower(model, others, image=images)
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, np.inf)
        model.compile(optimizer, **FAST)
        before = values(model.trainable_weights)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        fit(model, callbacks=[swap] * use_ema)
        assert_same_values(model.trainable_weights, before)
        optimizer.dynamic_scale.assign(64.0)
        fit(model, steps=1)
        found.append(values(model.trainable_weights))
    assert_same_values(*found)
    assert largest_error(found[0], before) > 0


# === Several optimizers ===


@pytest.mark.any_backend
def test_optimizers_that_are_not_known_yet_are_refused():
    optimizer = keras.optimizers.MultiOptimizer(lambda v: keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match=r"OptimizerMap.*Received: .* of a function"):
        make_model().compile(optimizer, decay_vectors=True)


@pytest.mark.any_backend
def test_a_path_that_matches_no_weight_is_refused_also_in_a_loaded_model(tmp_path):
    def by_path(*paths):
        default = keras.optimizers.SGD(1e-3)
        rates = keras.optimizers.OptimizerMap(default, dict.fromkeys(paths, default))
        return keras.optimizers.MultiOptimizer(rates)

    # keras_hub names the layers of DINOv2 after an encoder with a name.
    encoder = dino_encoder()
    model = kcm.ContrastiveModel.from_encoders(encoder, bert(), projection_dim=4)
    path = encoder.weights[-1].path
    model.compile(by_path(path, ".*encoder/.*bias"), **FAST)
    with pytest.raises(ValueError, match=r"Each key.*whole paths.*Received: 'encoder'"):
        model.compile(by_path(path, "encoder"), **FAST)
    model.save(tmp_path / "model.keras")
    with pytest.raises(
        ValueError, match=r"Each key.*`compile=False`.*Received: .layern"
    ):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.any_backend
def test_a_model_with_nothing_to_train_is_fitted_as_it_is():
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    model.backbone.trainable = False
    model.compile("adam", **FAST)
    before = values(model.variables)
    history = model.fit(random_pairs(4), batch_size=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert_same_values(model.variables, before)
