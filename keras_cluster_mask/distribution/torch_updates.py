"""In-place weight updates on torch, without the copies that Keras makes.

Once Keras clips gradients in-place and updates by a fused kernel in its `Adam` and
`AdamW` on torch, delete this file, and the calls of it in `gradients.py`.

Keras's clipping copies all gradients, and its Adam creates four temporary tensors of
the size of the model and reads the weights and moments a dozen times. torch has a fused
kernel that reads and writes each once. State stays in Keras's own variables, so
checkpoints do not depend on which code made the update.
"""

import math

import keras
import torch
from keras import ops
from torch.optim import adam as torch_adam


def methods(optimizer) -> dict:
    """Returns the functions of this file that replace methods of an optimizer, by name.

    The results equal Keras's up to rounding, and are stored in Keras's variables.
    Gradients are clipped in-place. The rest of `apply` stays Keras's own: accumulation,
    averages, constraints. Keras also performs the update if a weight is not float32,
    for AMSGrad, and for optimizers other than Adam and AdamW. Its update of SGD is
    in-place in 3.15, and copies the gradients once from 3.16 on.

    Args:
        optimizer: A Keras optimizer. Nothing is replaced in subclasses of users, which
            may have their own methods.
    """
    found = {}
    if not type(optimizer).__module__.startswith("keras."):
        return found
    if optimizer.weight_decay:
        found["_apply_weight_decay"] = apply_weight_decay
    if (optimizer.global_clipnorm or 0) > 0:
        found["_clip_gradients"] = clip_gradients
    if isinstance(optimizer, keras.optimizers.Adam) and not optimizer.amsgrad:
        found["_backend_update_step"] = update_step
    return found


def apply_weight_decay(optimizer, variables):
    # Keras's own fails if none of the weights decays.
    if any(map(optimizer._use_weight_decay, variables)):
        type(optimizer)._apply_weight_decay(optimizer, variables)


def clip_gradients(optimizer, gradients):
    if can_update(gradients):
        clip_by_global_norm(gradients, optimizer.global_clipnorm)
        return gradients
    return type(optimizer)._clip_gradients(optimizer, gradients)


def update_step(optimizer, gradients, variables, learning_rate):
    indices = [optimizer._get_variable_index(v) for v in variables]
    slots = optimizer._momentums, optimizer._velocities
    weights = [v.value for v in variables]
    moments = [[slot[i].value for i in indices] for slot in slots]
    if can_update(weights, gradients, *moments):
        adam(optimizer, weights, gradients, moments, learning_rate)
    else:
        own = type(optimizer)._backend_update_step
        own(optimizer, gradients, variables, learning_rate)


def clip_by_global_norm(gradients: list, max_norm: float) -> None:
    """Scales all gradients in-place by one factor, to a norm of at most `max_norm`.

    Args:
        gradients: List of torch tensors for which `can_update` is true.
        max_norm: Float. The maximum L2 norm of all gradients together. If their norm is
            not finite, all become NaN, as in Keras.
    """
    with torch.no_grad():
        norm = torch.nn.utils.get_total_norm(gradients)
        # No branch on the norm, which would make the program wait for the GPU.
        scale = max_norm * torch.minimum(1 / norm, torch.ones_like(norm) / max_norm)
        torch._foreach_mul_(gradients, scale + (norm - norm))


def can_update(*lists) -> bool:
    """Returns whether multi-tensor kernels support all tensors of some lists.

    They must be on one device, in float32 and in row-major order: the CPU kernel
    ignores strides.
    """
    tensors = [x for each in lists for x in each]
    return all(
        x.device == tensors[0].device
        and x.device.type in ("cpu", "cuda")
        and x.dtype == torch.float32
        and x.is_contiguous()
        for x in tensors
    )


def adam(optimizer, weights, gradients, moments, learning_rate) -> None:
    """Applies the update of `keras.optimizers.Adam` and `AdamW` without weight decay.

    Args:
        optimizer: The optimizer, for its options and its iteration count.
        weights: List of torch tensors for which `can_update` is true. Updated in-place.
        gradients: List of torch tensors, in the same order.
        moments: Two lists of torch tensors, first moments and second moments. Updated
            in-place too.
        learning_rate: Float or scalar.
    """
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
        torch_adam.adam(
            weights,
            gradients,
            *moments,
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            # A tensor, since reading its value would wait for the device.
            lr=rate,
            weight_decay=0.0,
            eps=optimizer.epsilon,
            maximize=False,
        )
