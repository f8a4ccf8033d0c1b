"""Data parallel training with torch processes.

`keras.distribution.DataParallel` supports JAX alone. Once it supports torch, delete
this file, and the calls of it in `replicas.py` and `gradients.py`.

Gradients are averaged while the backward pass still runs. It hides most of the time of
a reduction, and a few large reductions take less time than one for each weight.
`torch.nn.parallel.DistributedDataParallel` does the same, but its forward pass must use
all weights that the loss depends on, and Keras computes the loss after it.
"""

import contextlib
import functools
import itertools

import torch
from torch import distributed

BUCKET_BYTES = 25 * 2**20


def check_and_broadcast(model) -> None:
    """Gives all processes the weights of the first one.

    Raises:
        ValueError: If the processes train different weights.
    """
    trained = [None] * distributed.get_world_size()
    distributed.all_gather_object(
        trained,
        # Not by name, since Keras numbers the layers that a process has made.
        [(tuple(v.shape), str(v.dtype)) for v in model.trainable_weights],
    )
    if any(weights != trained[0] for weights in trained):
        columns = itertools.zip_longest(*trained)
        first = next(x for x in columns if len({*x}) > 1)
        raise ValueError(
            "All processes must train the same weights: make the same model, and "
            "freeze the same layers, in each. Received: numbers of trainable "
            f"weights {[*map(len, trained)]} by process; the first that differ "
            f"are {[*first]}"
        )
    for variable in [*model.variables, *model.optimizer.variables]:
        distributed.broadcast(variable.value.data, src=0)


def data_parallel(function, model, averaged):
    """Wraps the train function of a model, so that it trains as all processes do.

    Args:
        function: Keras's train function.
        model: The `keras.Model` that it trains.
        averaged: List of the variables that each process updates from its own rows.
    """

    @functools.wraps(function)
    def train_function(data):
        buckets = GradientBuckets([v.value for v in model.trainable_weights])
        with buckets.filled_by_backward_pass():
            logs = function(data)
        for variable in averaged:
            distributed.all_reduce(variable.value.data)
            variable.value.data /= distributed.get_world_size()
        return logs

    return train_function


class Gather(torch.autograd.Function):
    """A differentiable `all_gather`: torch deprecates its own, without a successor."""

    @staticmethod
    def forward(context, x):
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


# === Gradients ===


def reduce_gradients(gradients: list, weights: list) -> list:
    """Waits for the mean gradients over all processes.

    Args:
        gradients: List of this process's gradients, `None` for a weight without
            one. Gradients that are already in a bucket are ignored.
        weights: List of the torch parameters that the gradients belong to.

    Returns:
        A list of gradients, `None` for a weight without a gradient in any process.
    """
    buckets = GradientBuckets.running
    # A step of one's own may train a part of the weights.
    if buckets is None or [*map(id, weights)] != [*map(id, buckets.weights)]:
        buckets = GradientBuckets(weights)
    return buckets.reduce(gradients)


class GradientBuckets:
    """Averages the gradients of one training step over all processes, in buckets.

    A bucket is one tensor that holds the gradients of several weights. The gradients
    become views of it, so there is only one copy of them. Buckets hold the last weights
    first, because the backward pass finds most of their gradients first. A full bucket
    waits for those before it, so all processes reduce in the same order.

    If a process has no gradient for a weight, its gradient counts as 0. If no process
    has one, the result is `None`.

    Args:
        weights: List of torch parameters, the same on all processes.

    Attributes:
        running: The buckets that the backward pass fills now, or `None`.
    """

    running = None

    def __init__(self, weights: list):
        self.weights = weights
        self.buckets, self.bucket_of = [], {}
        self.num_started = 0
        self.found = {}
        for index in reversed(range(len(weights))):
            if not self.buckets or not self.buckets[-1].fits(weights[index]):
                self.buckets.append(_Bucket(weights[index]))
            self.buckets[-1].add(index, weights[index])
            self.bucket_of[index] = self.buckets[-1]

    @contextlib.contextmanager
    def filled_by_backward_pass(self):
        """A context in which the backward pass of the step fills the buckets."""

        def hook(index):
            return lambda weight: self.put(index, weight.grad)

        handles = [
            weight.register_post_accumulate_grad_hook(hook(index))
            for index, weight in enumerate(self.weights)
        ]
        GradientBuckets.running = self
        try:
            yield
        finally:
            GradientBuckets.running = None
            for handle in handles:
                handle.remove()

    def put(self, index, gradient):
        if index in self.found:
            raise RuntimeError(
                "A training step must compute the gradient of each weight once, in one "
                "backward pass. Received: a second gradient of a weight of shape "
                f"{tuple(gradient.shape)}"
            )
        self.found[index] = self.bucket_of[index].put(index, gradient)
        self.weights[index].grad = self.found[index]
        self._start()

    def reduce(self, gradients):
        for index, gradient in enumerate(gradients):
            if gradient is not None and index not in self.found:
                self.put(index, gradient)
        self._start(even_if_missing=True)
        for bucket in self.buckets:
            self.found |= bucket.finish()
        return [self.found[index] for index in range(len(gradients))]

    def _start(self, even_if_missing=False):
        for bucket in self.buckets[self.num_started :]:
            if bucket.missing and not even_if_missing:
                return
            bucket.start()
            self.num_started += 1


class _Bucket:
    def __init__(self, first):
        self.first = first
        self.places, self.size = {}, 0
        self.missing = set()
        self.flat = self.work = None

    def fits(self, weight):
        first = self.first
        alike = (weight.dtype, weight.device) == (first.dtype, first.device)
        size = (self.size + weight.numel()) * weight.element_size()
        return alike and size <= BUCKET_BYTES

    def add(self, index, weight):
        self.places[index] = slice(self.size, self.size + weight.numel()), weight.shape
        # Multi-tensor kernels are faster on tensors at multiples of 16 bytes.
        step = max(1, 16 // weight.element_size())
        self.size += -(-weight.numel() // step) * step
        self.missing.add(index)

    def put(self, index, gradient):
        """Stores this process's share of the mean of a gradient; returns its view."""
        self.missing.remove(index)
        return torch.div(gradient, distributed.get_world_size(), out=self._view(index))

    def start(self):
        """Starts the sum over all processes in the background."""
        for index in self.missing:
            self._view(index).zero_()
        # After the gradients, the bucket holds the number of processes that have each.
        counts = self.flat[self.size :].fill_(1.0)
        for position, index in enumerate(self.places):
            if index in self.missing:
                counts[position] = 0.0
        self.work = distributed.all_reduce(self.flat, async_op=True)

    def finish(self):
        """Waits for the sum; returns the gradients that this process lacked, by index.

        A gradient is a view or, if no process has it, `None`.
        """
        self.work.wait()
        if not self.missing:
            return {}
        # Read only now, since this waits for the GPU.
        counts = dict(zip(self.places, self.flat[self.size :].tolist()))
        return {i: self._view(i) if counts[i] else None for i in self.missing}

    def _view(self, index):
        if self.flat is None:
            # Allocated with the first gradient, so that a backward pass that finds all
            # gradients at its end does not hold a second copy of all of them.
            self.flat = self.first.new_empty(self.size + len(self.places))
        place, shape = self.places[index]
        return self.flat[place].view(shape)
