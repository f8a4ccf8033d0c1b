"""In-place weight updates on torch, without the copies that Keras makes.

Keras's clipping copies all gradients, and its Adam creates four temporary tensors of
the size of the model and reads the weights and moments a dozen times. torch has a fused
kernel that reads and writes each once. State stays in Keras's own variables, so
checkpoints do not depend on which code made the update.
"""

import math

import keras
from keras import ops


def are_available() -> bool:
    """Returns whether this backend updates tensors in-place."""
    return keras.backend.backend() == "torch"


def global_norm(gradients: list):
    """Computes the L2 norm of all gradients together, without copying them.

    Args:
        gradients: List of tensors.

    Returns:
        A scalar torch tensor. `None` on other backends, and for gradients that
        multi-tensor kernels do not support.
    """
    if not are_available() or not can_update(gradients):
        return None
    import torch

    with torch.no_grad():
        return torch.nn.utils.get_total_norm(gradients)


def clip_by_global_norm(gradients: list, max_norm: float, norm=None) -> bool:
    """Scales all gradients in-place by one factor, to a norm of at most `max_norm`.

    Args:
        gradients: List of torch tensors.
        max_norm: Float. The maximum L2 norm of all gradients together. If their norm is
            not finite, all become NaN, as in Keras.
        norm: Scalar tensor, the `global_norm` of the gradients, if it is known.

    Returns:
        Whether the gradients could be clipped. If not, nothing was changed.
    """
    import torch

    # A tensor that is passed twice would be scaled twice.
    if len({*map(id, gradients)}) < len(gradients) or not can_update(gradients):
        return False
    with torch.no_grad():
        norm = global_norm(gradients) if norm is None else norm
        # No branch on the norm, which would make the program wait for the GPU.
        scale = max_norm * torch.minimum(1 / norm, torch.ones_like(norm) / max_norm)
        torch._foreach_mul_(gradients, scale + (norm - norm))
    return True


def can_update(*lists) -> bool:
    """Returns whether multi-tensor kernels support all tensors of some lists.

    They must be on one device, in float32 and in row-major order: the CPU kernel
    ignores strides.
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
    """Applies the update of `keras.optimizers.Adam` and `AdamW` without weight decay.

    Args:
        optimizer: The optimizer, for its options and its iteration count.
        weights: List of torch tensors for which `can_update` is true. Updated in-place.
        gradients: List of torch tensors, in the same order.
        moments: Lists of torch tensors: first moments, second moments and, for AMSGrad,
            the largest second moments. Updated in-place too.
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
        # Keras adds epsilon to the moments before their bias correction, torch after
        # it. After infinitely many steps torch corrects nothing, so the correction is
        # in the learning rate, as in Keras.
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
            # A tensor, since reading its value would wait for the device.
            lr=rate,
            weight_decay=0.0,
            eps=optimizer.epsilon,
            maximize=False,
        )
