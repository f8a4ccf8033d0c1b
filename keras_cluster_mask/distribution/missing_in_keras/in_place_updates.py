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


def update_in_place(optimizer):
    """Makes global-norm clipping and Adam updates run in-place.

    The results equal Keras's up to rounding, and are stored in Keras's variables.
    Gradients are clipped in-place. The rest of `apply` stays Keras's own: decay,
    accumulation, averages, constraints. Keras also performs the update if a weight is
    not float32, for AMSGrad, and for optimizers other than Adam and AdamW. Its update
    of SGD is in-place in 3.15, and copies the gradients once from 3.16 on.

    Keras has no public hook for decay, clipping and the update within `apply`, so three
    private methods of one optimizer are replaced. A test fails if a version of Keras
    lacks them.

    Args:
        optimizer: A Keras optimizer.
    """
    clip, update = optimizer._clip_gradients, optimizer._backend_update_step
    decay = optimizer._apply_weight_decay

    def apply_weight_decay(variables):
        # Keras's own fails if none of the weights decays.
        if any(map(optimizer._use_weight_decay, variables)):
            decay(variables)

    def clip_gradients(gradients):
        max_norm = optimizer.global_clipnorm or 0.0
        # In Keras, a `clipnorm` that is set later comes first.
        in_place = max_norm > 0 and not optimizer.clipnorm
        if in_place and clip_by_global_norm(gradients, max_norm):
            return gradients
        return clip(gradients)

    def update_step(gradients, variables, learning_rate):
        indices = [optimizer._get_variable_index(v) for v in variables]
        slots = optimizer._momentums, optimizer._velocities
        weights = [v.value for v in variables]
        moments = [[slot[i].value for i in indices] for slot in slots]
        if not optimizer.amsgrad and can_update(weights, gradients, *moments):
            adam(optimizer, weights, gradients, moments, learning_rate)
        else:
            update(gradients, variables, learning_rate)

    optimizer._apply_weight_decay = apply_weight_decay
    base = keras.optimizers.Optimizer
    is_own = type(optimizer)._clip_gradients is base._clip_gradients
    if optimizer.global_clipnorm and is_own:
        optimizer._clip_gradients = clip_gradients
    # Subclasses may override the update.
    adams = keras.optimizers.Adam(name="adam"), keras.optimizers.AdamW(name="adamw")
    if type(optimizer) in map(type, adams):
        optimizer._backend_update_step = update_step


def clip_by_global_norm(gradients: list, max_norm: float) -> bool:
    """Scales all gradients in-place by one factor, to a norm of at most `max_norm`.

    Args:
        gradients: List of torch tensors.
        max_norm: Float. The maximum L2 norm of all gradients together. If their norm is
            not finite, all become NaN, as in Keras.

    Returns:
        Whether the gradients could be clipped. If not, nothing was changed.
    """
    # A tensor that is passed twice would be scaled twice.
    if len({*map(id, gradients)}) < len(gradients) or not can_update(gradients):
        return False
    with torch.no_grad():
        norm = torch.nn.utils.get_total_norm(gradients)
        # No branch on the norm, which would make the program wait for the GPU.
        scale = max_norm * torch.minimum(1 / norm, torch.ones_like(norm) / max_norm)
        torch._foreach_mul_(gradients, scale + (norm - norm))
    return True


def can_update(*lists) -> bool:
    """Returns whether multi-tensor kernels support all tensors of some lists.

    They must be on one device, in float32 and in row-major order: the CPU kernel
    ignores strides.
    """
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
