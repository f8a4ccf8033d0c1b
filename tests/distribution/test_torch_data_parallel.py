"""Gradients of processes of torch: their means, and who computes them."""

import keras
import pytest

from keras_cluster_mask.callbacks import Retrieval
from keras_cluster_mask.distribution import gradients
from tests.helpers import compiled_model, random_pairs, values

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="others reduce in compiled code"
)

if keras.backend.backend() == "torch":
    import torch

    from keras_cluster_mask.distribution import torch_data_parallel


def reduced(monkeypatch, *gradients):
    """The result in the first of two processes with these gradients."""
    sent = []
    monkeypatch.setattr(torch_data_parallel.distributed, "get_world_size", lambda: 2)
    # The second process, then the first, which adds what the second has sent.
    for all_reduce in (sent.append, lambda flat: flat.add_(sent[0])):
        monkeypatch.setattr(torch_data_parallel.distributed, "all_reduce", all_reduce)
        found = torch_data_parallel.all_reduce_mean(gradients[not sent])
    return found


@pytest.mark.parametrize("dtypes", [["float32"] * 3, ["float16", "float64", "float32"]])
def test_gradients_are_means_over_processes(dtypes, monkeypatch):
    one, other = (
        [
            torch.randn(shape).to(getattr(torch, dtype))
            for shape, dtype in zip([(3, 4), (), (5,)], dtypes)
        ]
        for _ in range(2)
    )
    # One that is no block of memory.
    one[0] = torch.randn(4, 3).to(one[0].dtype).T
    found = reduced(monkeypatch, one, other)
    for mean, *both in zip(found, one, other, strict=True):
        torch.testing.assert_close(mean, sum(both) / 2)


def test_a_weight_without_a_gradient_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(gradients, "num_replicas", lambda: 2)
    monkeypatch.setattr(
        torch_data_parallel, "all_reduce_mean", lambda x: [2 * y for y in x]
    )
    optimizer = keras.optimizers.SGD(1.0, weight_decay=0.5)
    gradients.wrap_optimizer(optimizer, optimizer, [optimizer])
    weights = [keras.Variable([1.0], name=name) for name in "abc"]
    with pytest.warns(UserWarning, match=r"do not exist for.*b"):
        optimizer.apply([torch.ones(1), None, torch.zeros(1)], weights)
    assert values(weights) == [[-1.5], [1.0], [0.5]]


def test_a_model_that_was_compiled_before_processes_were_joined_is_refused(monkeypatch):
    model = compiled_model()
    monkeypatch.setattr(gradients, "num_replicas", lambda: 2)
    with pytest.raises(ValueError, match=r"compiled after .*initialize.*Received: "):
        model.fit(random_pairs(4), verbose=0)


def test_keras_reduces_neither_gradients_nor_metrics(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("Keras reduces, too")

    model, pairs = compiled_model(), random_pairs(4)
    model.text_encoder.trainable = False
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
        wrapper = torch.nn.parallel.DistributedDataParallel
        monkeypatch.setattr(wrapper, "__init__", refuse)
        model.fit(pairs, validation_data=pairs, callbacks=[Retrieval(pairs)], verbose=0)
        model.text_tower.predict(pairs["token_ids"], verbose=0)
    finally:
        torch.distributed.destroy_process_group()
