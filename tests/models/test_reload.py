"""A model of any configuration is the same after it was saved and loaded."""

import re

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.models.head import ContrastiveHead
from keras_cluster_mask.training.layers import all_layers
from tests.helpers import (
    FAST,
    MASKINGS,
    assert_close,
    assert_same_values,
    by_tower,
    clip_with_lora,
    functional_vit,
    masked_vit,
    options_of,
    random_pairs,
    reloaded,
    text_bag,
    tiny_clip,
    tiny_siglip,
)

# With two rounds, each masking is drawn with encoders that it fits.
FEW, MANY = 4, 2 * (1 + len(MASKINGS))


def draw(case):
    """The configuration of a case, at random."""
    rng = np.random.default_rng(case)

    def choose(*options):
        return options[rng.integers(len(options))]

    encoders = ("clip", "siglip", "own")[case % 3]
    masking = [None, *MASKINGS][case % (1 + len(MASKINGS))]
    options = {
        "duplicates": choose("positive", "negative"),
        "micro_batch_size": choose(None, None, 4),
    }
    head = {"loss": choose("softmax", "sigmoid")}
    if encoders == "own":
        options["projection_dim"] = choose(None, 5)
    head["initial_temperature"] = choose(0.05, 0.2)
    head["max_logit_scale"] = choose(40.0, 100.0)
    options["head"] = head
    return {
        "encoders": encoders,
        "dtype": choose("float32", "mixed_bfloat16"),
        "masking": masking,
        "frozen": [
            choose(None, "image tower", "text tower", "masked encoder"),
            choose(None, "block", "weight"),
            choose(None, "temperature"),
        ],
        "optimizer": choose("adamw", "average", "momentum"),
        "towers": choose((), ("image",), ("image", "text")),
        "options": options,
    }


def make_optimizer(kind, scale=1.0, global_clipnorm=None):
    if kind == "adamw":
        schedule = keras.optimizers.schedules.CosineDecay(0.01 * scale, 20)
        return keras.optimizers.AdamW(
            schedule, weight_decay=0.1, global_clipnorm=global_clipnorm
        )
    if kind == "average":
        return keras.optimizers.Adam(0.01 * scale, use_ema=True, ema_momentum=0.9)
    return keras.optimizers.SGD(0.05 * scale, momentum=0.9, nesterov=True)


def make_model(case):
    made = draw(case)
    encoders, options = made["encoders"], made["options"]
    keras.config.set_dtype_policy(made["dtype"])
    options["head"] = ContrastiveHead(**options["head"])
    if encoders == "own":
        image_encoder = functional_vit(num_layers=2)
        if made["masking"] is not None:
            masking = MASKINGS[made["masking"]](seed=3, num_prefix_tokens=0)
            image_encoder = masked_vit(masking, num_layers=2)
        model = kcm.ContrastiveModel(image_encoder, text_bag(), **options)
    else:
        backbone = tiny_clip() if encoders == "clip" else tiny_siglip()
        masking = made["masking"]
        if masking is not None:
            masking = MASKINGS[masking](seed=3)
        model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking, **options)
    keras.config.set_dtype_policy("float32")
    for part in filter(None, made["frozen"]):
        part_of(model, part).trainable = False
    kind, towers = made["optimizer"], made["towers"]
    if towers:
        parts = {name: make_optimizer(kind, scale=0.5) for name in towers}
        default = make_optimizer(kind)
        optimizer = by_tower(model, default, **parts)
    else:
        optimizer = make_optimizer(kind, global_clipnorm=1.0)
    model.compile(optimizer, **FAST)
    return model


def part_of(model, name):
    image_encoder = getattr(model.image_encoder, "encoder", model.image_encoder)
    return {
        "image tower": image_encoder,
        "masked encoder": model.image_encoder,
        "text tower": model.text_encoder,
        "block": [x for x in model.text_encoder.layers if x.weights][-1],
        "weight": image_encoder.weights[0],
        "temperature": model.head.logit_scale,
    }[name]


def paths(variables):
    # The first name is that of the whole, and Keras counts weights without a name.
    names = [variable.path.split("/", 1)[-1] for variable in variables]
    return [re.sub(r"^variable_\d+$", "variable", name) for name in names]


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize(
    "case",
    [
        *range(FEW),
        *(pytest.param(case, marks=pytest.mark.slow) for case in range(FEW, MANY)),
    ],
)
def test_a_reloaded_model_is_the_same_and_trains_on_the_same(case, tmp_path):
    model, pairs = make_model(case), random_pairs(8)
    fit = dict(batch_size=8, verbose=0, shuffle=False)
    model.fit(pairs, **fit)
    loaded = reloaded(model, tmp_path)

    assert options_of(loaded) == options_of(model), draw(case)
    assert loaded._compile_options == model._compile_options
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for one, other in zip(all_layers(loaded), all_layers(model), strict=True):
        assert type(one) is type(other)
        # That of a whole has no effect, as the layers in it have their own.
        if not isinstance(one, (keras.Model, keras.layers.InputLayer, ContrastiveHead)):
            assert one.dtype_policy == other.dtype_policy, one.path
        assert one.trainable == other.trainable, one.path
    assert paths(loaded.trainable_variables) == paths(model.trainable_variables)
    assert_same_values(loaded.weights, model.weights)
    assert_same_values(loaded.optimizer.variables, model.optimizer.variables)
    assert_same_values(*(x.predict(pairs, verbose=0) for x in (loaded, model)))
    losses = [x.fit(pairs, **fit).history["loss"] for x in (loaded, model)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    # In half precision a sum depends on its order, of which Adam's step of 0.01 takes a
    # few hundredths.
    atol = 1e-6 if draw(case)["dtype"] == "float32" else 5e-4
    assert_close(loaded.weights, model.weights, atol)
    steps = [int(x.optimizer.iterations) for x in (loaded, model)]
    assert steps == [2, 2]


@pytest.mark.any_backend
@pytest.mark.parametrize("change", ["unfrozen", "frozen", "merged"])
def test_an_optimizer_of_other_weights_is_not_saved(change, tmp_path):
    backbone = clip_with_lora() if change == "merged" else tiny_clip()
    model = kcm.ContrastiveModel.from_backbone(backbone)
    fit = dict(batch_size=4, verbose=0)
    if change == "unfrozen":
        model.image_encoder.trainable = False
    model.compile("adam", **FAST)
    model.fit(random_pairs(4), **fit)
    if change != "merged":
        model.image_encoder.trainable = change == "unfrozen"
    with pytest.warns(UserWarning, match=r"other weights.*compile the loaded.*Recei"):
        loaded = reloaded(model, tmp_path)
    assert_same_values(
        *(x.predict(random_pairs(4), verbose=0) for x in (loaded, model))
    )
    with pytest.raises(ValueError, match=r"call `compile\(\)`"):
        loaded.fit(random_pairs(4), **fit)
