"""Checks of gradient buckets that need two processes of torch, as a program.

Each process runs the checks that it is given and prints the name of each that holds.
"""

import contextlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import torch
from torch import distributed

import keras_cluster_mask as kcm
from keras_cluster_mask.distribution.missing_in_keras import data_parallel
from keras_cluster_mask.distribution.missing_in_keras.data_parallel import (
    GradientBuckets,
    reduce_gradients,
)

# One weight of 16 x 16 fills a bucket.
data_parallel.BUCKET_BYTES = 1024


def weights_of(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(value) for value in values]


def reduced(weights, loss):
    """The buckets and the gradients of a loss, reduced as in training."""
    for weight in weights:
        weight.grad = None
    step = GradientBuckets(weights)
    with step.filled_by_backward_pass():
        loss.backward()
        gradients = [weight.grad for weight in weights]
        return step, reduce_gradients(gradients, weights)


def mean_of(loss_of, weights):
    """The gradients of the mean of all processes' losses, computed in this one."""
    loss = sum(map(loss_of, range(2))) / 2
    return torch.autograd.grad(loss, weights, allow_unused=True)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other)


def chain(weights, rank):
    x = torch.ones(2, 16) + rank
    for weight in weights:
        x = torch.tanh(x @ weight)
    return (x * (1 + rank)).sum()


def means_are_those_of_one_process(rank):
    weights = weights_of(*[(16, 16)] * 4)
    step, found = reduced(weights, chain(weights, rank))
    assert len(step.buckets) == 4
    assert_equal(found, mean_of(lambda r: chain(weights, r), weights))


def processes_may_differ_in_the_order_of_the_backward_pass(rank):
    weights = weights_of(*[(16, 16)] * 4)

    def loss_of(r):
        return chain(weights if r else weights[::-1], r)

    _, found = reduced(weights, loss_of(rank))
    assert_equal(found, mean_of(loss_of, weights))


def reductions_start_before_the_backward_pass_ends(rank):
    weights = weights_of(*[(16, 16)] * 4)
    x = torch.ones(2, 16, requires_grad=True)
    started = []
    y = torch.tanh(x @ weights[0])
    y.register_hook(lambda _: started.append(step.num_started))
    for weight in weights[1:]:
        y = torch.tanh(y @ weight)
    step = GradientBuckets(weights)
    with step.filled_by_backward_pass():
        y.sum().backward()
        assert started == [3]
        reduce_gradients([weight.grad for weight in weights], weights)


def small_weights_share_a_bucket_in_memory(rank):
    weights = weights_of((3,), (), (5, 7), (16, 16))
    step, found = reduced(weights, sum((w**2).sum() for w in weights))
    assert [[*x.places] for x in step.buckets] == [[3], [2, 1, 0]]
    assert_equal(found, [2 * weight for weight in weights])
    storages = [x.untyped_storage().data_ptr() for x in found]
    assert storages[0] == storages[1] == storages[2] != storages[3]
    assert all(x.data_ptr() % 16 == 0 for x in found)
    # Weights hold no copies.
    for weight, gradient in zip(weights, found):
        assert weight.grad.data_ptr() == gradient.data_ptr()


def a_weight_without_gradient_in_one_process_counts_as_0_there(rank):
    weights = weights_of((4,), (4,), (16, 16), (4,))

    def loss_of(r):
        taken = [weights[0], weights[2]] if r else weights[:2]
        return sum((w**2).sum() for w in taken)

    _, found = reduced(weights, loss_of(rank))
    assert_equal(found, mean_of(loss_of, weights))
    assert found[3] is None
    assert all(x is not None for x in found[:3])


def gradients_of_other_passes_are_reduced_too(rank):
    weights = weights_of((4,), (16, 16))
    gradients = [torch.full_like(w, 1.0 + rank) for w in weights]
    found = reduce_gradients(gradients, weights)
    assert_equal(found, [torch.full_like(w, 1.5) for w in weights])
    # Without hooks, a backward pass is none of their concern.
    assert_equal(found, reduced(weights, sum(1.5 * w.sum() for w in weights))[1])


def weights_of_several_dtypes_are_reduced(rank):
    halves = weights_of((4,), dtype=torch.float16)
    doubles = weights_of((4,), (2,), dtype=torch.float64)
    weights = [*halves, *doubles]
    _, found = reduced(weights, sum((1 + rank) * w.double().sum() for w in weights))
    assert_equal(found, [torch.full_like(w, 1.5) for w in weights])


def hooks_are_removed_when_a_step_fails(rank):
    weights = weights_of((4,))
    step = GradientBuckets(weights)
    with contextlib.suppress(KeyboardInterrupt), step.filled_by_backward_pass():
        raise KeyboardInterrupt
    (weights[0] * (1 + rank)).sum().backward()
    assert_equal([weights[0].grad], [torch.full((4,), 1.0 + rank)])
    assert step.num_started == 0
    assert GradientBuckets.running is None


def a_second_backward_pass_in_a_step_is_an_error(rank):
    weights = weights_of((4,))
    message = None
    with GradientBuckets(weights).filled_by_backward_pass():
        weights[0].sum().backward()
        try:
            weights[0].sum().backward()
        except RuntimeError as error:
            message = str(error)
        reduce_gradients([None], weights)
    assert "Received: a second gradient of a weight of shape (4,)" in message


if __name__ == "__main__":
    kcm.distribution.initialize()
    for check in sys.argv[1:]:
        globals()[check](distributed.get_rank())
        print(check, flush=True)
    distributed.destroy_process_group()
