"""Data parallel training with torch processes.

Keras 3.15 has none. Keras 3.16 wraps models in torch's `DistributedDataParallel`, but
not an `OwnReduction` of `replicas.py`. The wrapper requires that all weights have a
gradient, that no model is frozen, and that all processes evaluate together. None of
this holds here. Once Keras can do without, delete this file and that
class, and their calls in `replicas.py` and `gradients.py`.

Gradients are averaged after the backward pass, in one reduction, which takes less time
than one for each weight.
"""

import torch
from torch import distributed


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
        raise ValueError(
            "All processes must train the same weights: build the same model, and "
            "freeze the same layers, in each process. Received: numbers of trainable "
            f"weights {[*map(len, trained)]} by process"
        )
    for variable in [*model.variables, *model.optimizer.variables]:
        distributed.broadcast(variable.value.data, src=0)


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


def all_reduce_mean(gradients: list) -> list:
    """Averages gradients over all processes.

    Args:
        gradients: List of this process's gradients, of the same weights in all
            processes.
    """
    flat = torch.cat([x.flatten() for x in gradients])
    flat /= distributed.get_world_size()
    distributed.all_reduce(flat)
    parts = flat.split([x.numel() for x in gradients])
    return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, gradients)]
