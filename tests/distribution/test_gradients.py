"""What each step does with the gradients of the last one."""

import keras
import keras_hub
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.distribution import gradients
from keras_cluster_mask.distribution.backends import keeping_weights
from tests.helpers import (
    TRANSFORMER,
    assert_close,
    random_pairs,
    small_model,
    to_numpy,
    vision_encoder,
)


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
        pytest.raises(ValueError, match=r"also the last one.*Received: 6 rows"),
        keeping_weights(model),
    ):
        raise IndivisibleError("6 rows")
    monkeypatch.setattr(gradients, "parts_of_batch", lambda: 4)
    with pytest.raises(ValueError, match=r"divide.*Received: batch_size=6, 4 replicas"):
        model.fit(random_pairs(6), batch_size=6, verbose=0)
    model.fit(random_pairs(8), batch_size=8, verbose=0)
