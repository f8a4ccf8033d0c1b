"""Updates of weights in place on torch, where Keras's take copies of all of them.

Keras's clipping copies all gradients, and its Adam makes four more tensors of the size
of the model and reads the weights and moments a dozen times. torch has a kernel that
reads and writes each once. State stays in Keras's own variables, so checkpoints do not
depend on which of them made the update.
"""

import math

import keras
from keras import ops


def are_available() -> bool:
    """Whether this backend updates tensors in place."""
    return keras.backend.backend() == "torch"


def global_norm(gradients: list):
    """The L2 norm of all gradients together, without copies of them.

    Args:
        gradients: List of tensors.

    Returns:
        A scalar torch tensor. `None` on other backends, and for gradients that kernels
        for many tensors cannot work on.
    """
    if not are_available() or not can_update(gradients):
        return None
    import torch

    with torch.no_grad():
        return torch.nn.utils.get_total_norm(gradients)


def clip_by_global_norm(gradients: list, max_norm: float, norm=None) -> bool:
    """Scales gradients down in place to a norm, all by the same factor.

    Args:
        gradients: List of torch tensors.
        max_norm: Float. The largest L2 norm that all gradients together may have. If
            their norm is not finite, all become NaN, as in Keras.
        norm: Scalar tensor. Their `global_norm`, if it is known.

    Returns:
        Whether it could. If not, nothing was changed.
    """
    import torch

    # A tensor given twice would be scaled twice.
    if len({*map(id, gradients)}) < len(gradients) or not can_update(gradients):
        return False
    with torch.no_grad():
        norm = global_norm(gradients) if norm is None else norm
        # No condition on a value, for which a GPU would have to be waited for.
        scale = max_norm * torch.minimum(1 / norm, torch.ones_like(norm) / max_norm)
        torch._foreach_mul_(gradients, scale + (norm - norm))
    return True


def can_update(*lists) -> bool:
    """Whether kernels for many tensors can work on all tensors of some lists.

    They must be on one device, in float32 and in row-major order: the kernel for a CPU
    does not look at strides.
    """
    import torch

    tensors = [x for each in lists for x in each]
    return all(
        isinstance(x, torch.Tensor)
        and x.device == tensors[0].device
        and x.device.type in ("cpu", "cuda")
        and x.dtype == torch.float32
        and x.layout == torch.strided
        and x.is_contiguous()
        for x in tensors
    )


def adam(optimizer, weights, gradients, moments, learning_rate) -> None:
    """The update of `keras.optimizers.Adam` and `AdamW`, without their weight decay.

    Args:
        optimizer: The optimizer, for its options and its number of updates.
        weights: List of torch tensors for which `can_update` is true. Updated.
        gradients: List of torch tensors, in the same order.
        moments: Lists of torch tensors: first moments, second moments and, for AMSGrad,
            the largest second moments. Updated too.
        learning_rate: Float or scalar.
    """
    import torch
    from torch.optim.adam import adam

    with torch.no_grad():
        step = ops.cast(optimizer.iterations + 1, "float32")
        power_1, power_2 = (
            ops.power(ops.cast(beta, "float32"), step)
            for beta in (optimizer.beta_1, optimizer.beta_2)
        )
        rate = ops.cast(learning_rate, "float32")
        rate = rate * ops.sqrt(1 - power_2) / (1 - power_1)
        # Keras adds epsilon to moments before they are corrected for their start at
        # zero, and torch after. After infinitely many steps torch corrects nothing, so
        # the correction is in the rate, as in Keras.
        steps = torch.full((len(weights),), math.inf, device=weights[0].device)
        adam(
            weights,
            gradients,
            *moments,
            *[[]] * (3 - len(moments)),
            list(steps.unbind()),
            fused=True,
            amsgrad=len(moments) == 3,
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            # A tensor, as its value would have to be waited for.
            lr=rate,
            weight_decay=0.0,
            eps=optimizer.epsilon,
            maximize=False,
        )
