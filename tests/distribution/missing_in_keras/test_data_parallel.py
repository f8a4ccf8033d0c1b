"""Gradients of processes of torch: their means, whatever each process lacks."""

import keras
import pytest

from keras_cluster_mask.callbacks import Retrieval
from tests.helpers import compiled_model, random_pairs

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="others reduce in compiled code"
)

if keras.backend.backend() == "torch":
    import torch

    from keras_cluster_mask.distribution.missing_in_keras import data_parallel


def reduced(monkeypatch, weights, *gradients):
    """The result in the first of two processes with these gradients."""
    sent = []
    monkeypatch.setattr(data_parallel.distributed, "get_world_size", lambda: 2)
    # The second process, then the first, which adds what the second has sent.
    for all_reduce in (sent.append, lambda flat: flat.add_(sent[0])):
        monkeypatch.setattr(data_parallel.distributed, "all_reduce", all_reduce)
        found = data_parallel.reduce_gradients(gradients[not sent], weights)
    return found


@pytest.mark.parametrize("dtypes", [["float32"] * 3, ["float16", "float64", "float32"]])
def test_gradients_are_means_over_processes(dtypes, monkeypatch):
    weights = [
        torch.nn.Parameter(torch.randn(shape).to(getattr(torch, dtype)))
        for shape, dtype in zip([(3, 4), (), (5,)], dtypes)
    ]
    one, other = ([torch.randn_like(w) for w in weights] for _ in range(2))
    # One that is no block of memory.
    one[0] = torch.randn(4, 3).to(one[0].dtype).T
    found = reduced(monkeypatch, weights, one, other)
    for mean, *both in zip(found, one, other, strict=True):
        torch.testing.assert_close(mean, sum(both) / 2)


def test_a_gradient_that_a_process_lacks_counts_as_0_there(monkeypatch):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(4)]
    two = torch.full((2,), 2.0)
    lacking = [two, two, None, None], [two, None, two, None]
    found = reduced(monkeypatch, weights, *lacking)
    assert found[3] is None
    for mean, value in zip(found, (2.0, 1.0, 1.0)):
        torch.testing.assert_close(mean, torch.full((2,), value))


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
