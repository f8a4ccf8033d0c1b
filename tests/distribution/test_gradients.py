"""What an optimizer does with gradients, and a step with those of the last one."""

import types

import keras
import keras_hub
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.distribution import gradients
from keras_cluster_mask.distribution.backends import keeping_weights
from keras_cluster_mask.training.optimizers import optimizer_parts
from tests.helpers import (
    FAST,
    TRANSFORMER,
    assert_close,
    by_tower,
    random_pairs,
    small_model,
    to_numpy,
    vision_encoder,
)

PARTS = {
    "jax": set(),
    "tensorflow": {"_all_reduce_sum_gradients"},
    "torch": {"_apply_weight_decay", "_backend_update_step", "_clip_gradients"},
}[keras.backend.backend()]
WHOLE = {"apply"} if keras.backend.backend() == "tensorflow" else set()
STATE = {"load_own_variables", "save_own_variables"}


def adamw(**options):
    return keras.optimizers.AdamW(1e-3, global_clipnorm=1.0, **options)


def replaced(optimizer):
    """The methods of an optimizer that were replaced, by name."""
    attributes = vars(optimizer).items()
    return {k: x for k, x in attributes if isinstance(x, types.MethodType)}


def test_the_methods_that_are_replaced_depend_on_the_last_place_alone():
    model, optimizer = small_model(), adamw()
    scaled = keras.optimizers.LossScaleOptimizer
    for whole, expected in (
        (optimizer, WHOLE | PARTS),
        (scaled(optimizer), STATE | PARTS),
        (by_tower(model, "sgd", image=optimizer), STATE | PARTS),
        (scaled(by_tower(model, "sgd", text=optimizer)), STATE | PARTS),
        (optimizer, WHOLE | PARTS),
    ):
        for _ in range(2):
            model.compile(whole)
            assert replaced(optimizer).keys() == expected
            assert replaced(whole).keys() - PARTS == WHOLE


def test_keras_calls_each_method_that_is_replaced():
    model, called = small_model(), set()
    parts = by_tower(model, adamw(), image=adamw())
    model.compile(keras.optimizers.LossScaleOptimizer(parts), **FAST)

    def spy(optimizer, name, method):
        def spied(*args, **kwargs):
            called.add((optimizer, name))
            return method(*args, **kwargs)

        setattr(optimizer, name, spied)

    for each in (model.optimizer, *optimizer_parts(model.optimizer)):
        for name, method in replaced(each).items():
            spy(each, name, method)
    model.train_on_batch(random_pairs(4))
    expected = {(x, name) for x in parts.optimizers for name in PARTS}
    assert called == expected | {(model.optimizer, name) for name in WHOLE}


def unnamed_towers():
    """keras_hub's towers without names: their weights have equal paths."""
    text_encoder = keras_hub.models.CLIPTextEncoder(
        30, 16, max_sequence_length=6, **TRANSFORMER
    )
    encoders = vision_encoder("CLIP"), text_encoder
    return keras_hub.models.CLIPBackbone(*encoders, projection_dim=8)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="Others keep none.")
def test_each_step_starts_without_gradients_of_weights_with_equal_paths():
    model = kcm.ContrastiveModel.from_backbone(unnamed_towers())
    model.compile(keras.optimizers.SGD(0.0))
    pairs, gradients_of_steps = random_pairs(4), []
    for _ in range(3):
        model.train_on_batch(pairs)
        weights = model.trainable_weights
        gradients_of_steps.append([to_numpy(weight.value.grad) for weight in weights])
    for later in gradients_of_steps[1:]:
        assert_close(later, gradients_of_steps[0], atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="Others keep none.")
def test_each_step_of_an_execution_starts_without_gradients():
    model = small_model()
    tensors = [weight.value for weight in model.trainable_weights]

    def train_function(batches):
        for batch in batches:
            assert all(x.grad is None for x in tensors)
            for x in tensors:
                x.grad = x.detach() + batch

    gradients.over_processes(train_function, model, ())([1.0, 2.0])
    assert all(x.grad is not None for x in tensors)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="It splits all batches.")
def test_batches_that_devices_cannot_share_are_refused(monkeypatch):
    class IndivisibleError(ValueError):
        """The name of JAX's."""

    model = small_model()
    model.compile("sgd")
    with (
        pytest.raises(ValueError, match=r"including the last one.*Received: 6 rows"),
        keeping_weights(model),
    ):
        raise IndivisibleError("6 rows")
    monkeypatch.setattr(gradients, "parts_of_batch", lambda: 4)
    with pytest.raises(ValueError, match=r"divisible.*batch_size=6, 4 replicas"):
        model.fit(random_pairs(6), batch_size=6, verbose=0)
    model.fit(random_pairs(8), batch_size=8, verbose=0)
