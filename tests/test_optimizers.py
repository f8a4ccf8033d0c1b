"""Learning rates by block, for each family and in files, and rates on small data."""

import re
import zipfile

import h5py
import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.encoders.test_pooled import TEXTS, bert, resnet
from tests.helpers import (
    FAST,
    assert_same_values,
    deit_encoder,
    dino_3_encoder,
    dino_encoder,
    make_backbone,
    random_pairs,
    reloaded,
    small_model,
    to_numpy,
    values,
    vit_encoder,
)
from tests.training.test_optimizers import BATCH, STEPS

BLOCKS, DECAY, RATE = 3, 0.5, 0.08
# Names of layers before the first block, and after the last.
FIRST = re.compile(r"embed|pre_layer_norm|patch")
LAST = re.compile(r"layer_?norm|post_norm|/ln/|/norm/|pool|_head/")


def connected(image=None, text=None, **options):
    keras.utils.set_random_seed(0)
    image, text = image or dino_encoder(), text or bert(dropout=0.0)
    options = {"masking": kcm.RandomMasking(0.5, seed=1), "projection_dim": 4} | options
    return kcm.ContrastiveModel.from_encoders(image, text, **options)


def fit(model, steps=STEPS, **options):
    pairs = random_pairs(BATCH * steps)
    # An id of 0 is padding.
    pairs["token_ids"] = np.maximum(pairs["token_ids"], 1)
    model.fit(pairs, batch_size=BATCH, shuffle=False, verbose=0, **options)


def optimizer_of(model, steps=10, **options):
    options = {"block_decay": DECAY} | options
    return kcm.optimizer_by_block(model, RATE, steps, **options)


def rates_of(model, optimizer):
    """The learning rate of each trained weight in the first step."""
    optimizer.build(model.trainable_variables)
    rates = {
        id(v): float(to_numpy(part.learning_rate))
        for part in optimizer.optimizers
        if part.built
        for v in part._trainable_variables
    }
    return [rates[id(v)] for v in model.trainable_variables]


def number_of(path):
    """The number of a weight's block, which may begin at 0 or 1."""
    if found := re.search(r"(?:block|layers?|group)_(\d+)/", path):
        return int(found[1])
    is_first = FIRST.search(path) is not None
    assert is_first or LAST.search(path), path
    return -np.inf if is_first else np.inf


def expected_rates(model):
    """The rates by the numbers in the names of layers."""
    expected = {}
    for encoder in (model.image_encoder, model.text_encoder):
        numbers = {id(v): number_of(v.path) for v in encoder.trainable_weights}
        known = [*filter(np.isfinite, numbers.values())]
        for key, number in numbers.items():
            number = np.clip(number, min(known) - 1, max(known))
            expected[key] = RATE * DECAY ** (max(known) - number)
    return [expected.get(id(v), 10 * RATE) for v in model.trainable_variables]


def pair_of(family):
    options = {} if family == "SigLIP" else {"projection_dim": 16}
    return kcm.ContrastiveModel.from_backbone(make_backbone(family, **options))


IMAGES = vit_encoder, deit_encoder, dino_encoder, dino_3_encoder


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make",
    [
        *(lambda x=x: connected(x(num_layers=BLOCKS)) for x in IMAGES),
        *(
            lambda x=x: connected(text=TEXTS[x](num_layers=BLOCKS))
            for x in TEXTS
            if x != "ALBERT"
        ),
        *(lambda x=x: pair_of(x) for x in ("CLIP", "MetaCLIP2", "SigLIP")),
    ],
)
def test_each_block_has_a_part_of_the_rate_of_the_next(make):
    model = make()
    found = rates_of(model, optimizer_of(model))
    assert found == pytest.approx(expected_rates(model))
    # The embeddings, each block, and the projections.
    assert len({*found}) > 2


def test_the_first_step_of_adam_moves_each_matrix_by_its_rate():
    model = connected(dino_encoder(num_layers=2), bert(num_layers=2, dropout=0.0))
    model.compile(optimizer_of(model, steps=10**6, weight_decay=0.0))
    for part in model.optimizer.optimizers:
        part.epsilon = 1e-12
    before = values(model.trainable_variables)
    rates = rates_of(model, model.optimizer)
    fit(model, steps=1)
    assert len({*rates}) == 4
    for weight, old, rate in zip(model.trainable_variables, before, rates):
        moved = np.abs(to_numpy(weight) - old).max()
        assert moved < 1.001 * rate, weight.path
        assert moved > 0.99 * rate or weight.name != "kernel", weight.path


@pytest.mark.any_backend
def test_rates_follow_a_cosine_to_zero():
    model = connected()
    optimizer = optimizer_of(model, projections=3.0, weight_decay=0.2)
    model.compile(optimizer, **FAST)
    for step in (0, 5, 10):
        for part in optimizer.optimizers:
            part.iterations.assign(step)
        highest = max(float(to_numpy(x.learning_rate)) for x in optimizer.optimizers)
        cosine = 0.5 * (1 + np.cos(np.pi * step / 10))
        assert highest == pytest.approx(3 * RATE * cosine, abs=1e-7)
    assert {part.weight_decay for part in optimizer.optimizers} == {0.2}


@pytest.mark.any_backend
def test_an_encoder_that_is_not_known_has_one_rate_with_a_warning(recwarn):
    model = connected(resnet(), masking=None)
    optimizer_of(model, block_decay=1.0)
    assert not [x for x in recwarn if "No transformer blocks" in str(x.message)]
    with pytest.warns(UserWarning, match=r"No transformer blocks.*image_encoder.*Rec"):
        optimizer = optimizer_of(model)
    weights = {id(v) for v in model.image_encoder.weights}
    rates = zip(model.trainable_variables, rates_of(model, optimizer))
    found = [rate for v, rate in rates if id(v) in weights]
    assert found == pytest.approx([RATE] * len(found))


@pytest.mark.any_backend
def test_encoders_with_layers_of_one_name_are_refused():
    def encoder(*shape):
        given = keras.Input(shape)
        flat = keras.layers.Flatten()(given)
        return keras.Model(given, keras.layers.Dense(8, name="features")(flat))

    model = kcm.ContrastiveModel(encoder(8, 8, 3), encoder(4), projection_dim=4)
    with (
        pytest.warns(UserWarning, match="one learning rate"),
        pytest.raises(ValueError, match=r"different names.*Received: .*features/"),
    ):
        optimizer_of(model)


@pytest.mark.any_backend
def test_a_layer_of_shared_blocks_is_one_block():
    model = connected(text=TEXTS["ALBERT"](num_layers=BLOCKS))
    # One for embeddings, one for the block, and one for projections.
    assert len({*rates_of(model, optimizer_of(model))}) == 3


@pytest.mark.any_backend
def test_a_frozen_encoder_and_lora_train_what_is_left():
    for freeze in (
        lambda image: setattr(image, "trainable", False),
        lambda image: image.enable_lora(2),
    ):
        image = vit_encoder(num_layers=2)
        freeze(image)
        model = connected(image)
        model.compile(optimizer_of(model), **FAST)
        fit(model, steps=1)
        found = {
            v.path: rate
            for v, rate in zip(
                model.trainable_variables, rates_of(model, model.optimizer)
            )
        }
        trained = {id(v) for v in model.image_encoder.trainable_weights}
        paths = {v.path for v in model.trainable_variables if id(v) in trained}
        assert all(found[path] <= RATE for path in paths)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.0},
        {"steps": 0},
        {"block_decay": 1.1},
        {"projections": 0.0},
        {"projections": np.inf},
        {"weight_decay": -0.1},
        {"weight_decay": np.nan},
    ],
)
def test_an_argument_out_of_range_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"`{name}` must.*Received: {name}="):
        kcm.optimizer_by_block(
            small_model(), **{"learning_rate": 0.1, "steps": 1} | options
        )


# === Files, loss scaling and callbacks ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make",
    [
        # keras_hub names the layers of some encoders after the encoder, if it has a
        # name, and leaves the name of a weight of SigLIP's head to Keras.
        *(lambda x=x: connected(x()) for x in IMAGES),
        *(lambda x=x: connected(x(name="own")) for x in IMAGES),
        lambda: pair_of("SigLIP"),
    ],
)
def test_a_loaded_model_continues_at_the_same_rates(make, tmp_path):
    model = make()
    model.compile(optimizer_of(model), **FAST)
    fit(model, steps=2)
    loaded = reloaded(model, tmp_path)
    assert_same_values(loaded.optimizer.variables, model.optimizer.variables)
    assert rates_of(loaded, loaded.optimizer) == rates_of(model, model.optimizer)
    for each in (model, loaded):
        keras.utils.set_random_seed(1)
        fit(each, steps=2)
    assert_same_values(loaded.weights, model.weights)


@pytest.mark.any_backend
def test_blocks_after_the_last_that_is_pooled_count_as_that_one():
    model = connected(dino_encoder(num_layers=BLOCKS), image_blocks=[1, 2])
    model.compile(optimizer_of(model), **FAST)
    rates = zip(model.trainable_variables, rates_of(model, model.optimizer))
    found = {v.path: rate for v, rate in rates}
    for number, rate in enumerate([DECAY * RATE, RATE, RATE]):
        assert found[f"encoder/layers_{number}/norm1/gamma"] == pytest.approx(rate)
    # Keras refuses an optimizer that gets no gradients.
    fit(model)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_file_has_the_state_of_each_optimizer_once(scaled, tmp_path):
    model = connected()
    optimizer = optimizer_of(model)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    model.compile(optimizer)
    fit(model, steps=2)
    loaded = reloaded(model, tmp_path)
    assert_same_values(loaded.optimizer.variables, model.optimizer.variables)
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        path = file.extract("model.weights.h5", tmp_path)
    sizes = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, x: sizes.update({name: getattr(x, "size", 0)}))
    saved = sum(size for name, size in sizes.items() if name.startswith("optimizer/"))
    assert saved == sum(int(np.prod(v.shape)) for v in model.optimizer.variables)


@pytest.mark.any_backend
def test_callbacks_that_set_a_rate_are_refused_by_keras():
    model = connected()
    model.compile(optimizer_of(model), **FAST)
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    with pytest.raises(TypeError, match="LearningRateSchedule"):
        fit(model, callbacks=[halve])


# === From scratch, on small data ===


def rate_at(optimizer, step):
    optimizer.iterations.assign(step)
    return float(optimizer.learning_rate)


def expected_rate(step, steps, highest):
    """A linear warm-up over a tenth of the steps, then half a cosine (NumPy)."""
    warmup = steps // 10
    if step < warmup:
        return highest * step / warmup
    return highest * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.any_backend
@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(9, 50), (1, 25), (1, 1)])
def test_the_rate_warms_up_and_falls_to_zero(epochs, steps_per_epoch):
    optimizer = kcm.small_data_optimizer(epochs, steps_per_epoch, 2e-3)
    steps = epochs * steps_per_epoch
    for step in {0, 1, steps // 10, steps // 2, steps}:
        expected = expected_rate(step, steps, 2e-3)
        assert rate_at(optimizer, step) == pytest.approx(expected, abs=1e-8), step


@pytest.mark.any_backend
def test_the_optimizer_is_that_of_the_measurements():
    optimizer = kcm.small_data_optimizer(np.int64(1), np.int64(20))
    assert isinstance(optimizer, keras.optimizers.AdamW)
    assert (optimizer.weight_decay, optimizer.beta_2) == (0.1, 0.98)
    assert rate_at(optimizer, 2) == pytest.approx(1e-3)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("argument", "value"),
    [("epochs", 0), ("steps_per_epoch", 0), ("learning_rate", 0.0)],
)
def test_bad_arguments_are_refused_by_name(argument, value):
    given = {"epochs": 9, "steps_per_epoch": 50, argument: value}
    with pytest.raises(ValueError, match=rf"`{argument}`.*Received: {argument}="):
        kcm.small_data_optimizer(**given)
