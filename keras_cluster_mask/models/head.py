import functools
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_choice, check_range
from keras_cluster_mask.types import Tensor

INITIAL_TEMPERATURE = {"softmax": 0.07, "sigmoid": 0.1}
INITIAL_LOGIT_BIAS = -10.0
# A scale may exceed its limit by rounding errors, such as in 1 / 49.
TOLERANCE = 1 + 1e-6


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ContrastiveHead(keras.layers.Layer):
    """The temperature and the bias with which similarities become logits.

    The scale of the logits is 1 / temperature; the sigmoid loss adds a bias. A
    `ContrastiveModel` makes a head, or takes one with another temperature, bias or
    limit. A model of a keras_hub backbone uses the temperature and bias of the
    backbone, which the arguments can set.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    head = kcm.models.ContrastiveHead(initial_temperature=0.05)
    model = kcm.ContrastiveModel.from_backbone(backbone, head=head)
    ```

    Args:
        loss: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP). Defaults to the loss of a
            backbone's family, or to `"softmax"` in other models.
        initial_temperature: Float. Defaults to 0.07 for softmax and 0.1 for sigmoid. A
            pre-trained backbone keeps its temperature.
        initial_logit_bias: Float, for the sigmoid loss. Defaults to -10.
        max_logit_scale: Float. The maximum scale. Defaults to 100, or to 1000 for a
            SigLIP backbone. If a backbone has a higher scale, its scale is the limit.
        **kwargs: Arguments of `keras.layers.Layer`.

    Attributes:
        logit_scale: float32 variable, the logarithm of the scale. This and `logit_bias`
            exist once the head is part of a model.
        logit_bias: float32 variable, or `None` for softmax.
        is_trained: float32 variable, 1 once a step has trained a new head and the
            projections of its model. `None` for the head of a backbone.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
    """

    def __init__(
        self,
        loss: str | None = None,
        initial_temperature: float | None = None,
        initial_logit_bias: float | None = None,
        max_logit_scale: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_choice("loss", loss, (None, *INITIAL_TEMPERATURE))
        for name, value in (
            ("initial_temperature", initial_temperature),
            ("max_logit_scale", max_logit_scale),
        ):
            if value is not None:
                check_range(name, value, 0, math.inf, "()")
        if initial_logit_bias is not None:
            ends = -math.inf, math.inf, "()"
            check_range("initial_logit_bias", initial_logit_bias, *ends)
        self.loss = loss
        self.initial_temperature = initial_temperature
        self.initial_logit_bias = initial_logit_bias
        self.max_logit_scale = max_logit_scale
        self.logit_scale = self.logit_bias = self.is_trained = None

    def settle(
        self,
        loss: str = "softmax",
        max_logit_scale: float = 100.0,
        scalars: keras.layers.Layer | None = None,
    ) -> None:
        """Sets what was not given, and makes or takes the weights, once.

        Args:
            loss: String, the default loss.
            max_logit_scale: Float, the default limit of the scale.
            scalars: The layer of a backbone with the `logit_scale`, and perhaps a
                `logit_bias`, to use.

        Raises:
            ValueError: If the initial temperature or bias do not fit loss and limit, or
                if the head is of a model of another backbone.
        """
        if self.built:
            if scalars is not None and self.logit_scale is not scalars.logit_scale:
                raise ValueError(
                    "`head` must be new, or from a model of this backbone. "
                    f"Received: {self}"
                )
            return
        loss = self.loss or loss
        limit = float(self.max_logit_scale or max_logit_scale)
        temperature, bias = self.initial_temperature, self.initial_logit_bias
        if temperature is not None and temperature < 1 / (limit * TOLERANCE):
            raise ValueError(
                "`initial_temperature` must be at least 1 / `max_logit_scale`, below "
                "which the temperature cannot fall. Received: "
                f"initial_temperature={temperature}, max_logit_scale={limit}"
            )
        if bias is not None and loss == "softmax":
            raise ValueError(
                "`initial_logit_bias` must be None unless loss='sigmoid'. Received: "
                f"initial_logit_bias={bias}, loss='softmax'"
            )
        scale_weight = getattr(scalars, "logit_scale", None)
        bias_weight = getattr(scalars, "logit_bias", None)
        given = [x for x in (scale_weight, bias_weight) if x is not None]
        for weight in given:
            # keras_hub initializes it with a Python number, which is weakly typed on
            # JAX. The second step would be compiled again.
            weight.assign(np.array(ops.convert_to_numpy(weight)))
        # keras_hub starts SigLIP at a scale of 1 and a bias of 0. From there, a model
        # would first have to learn that nearly all pairs are negatives.
        is_fresh = (
            len(given) < (2 if loss == "sigmoid" else 1)
            or (bias_weight is not None and not any(map(ops.convert_to_numpy, given)))
        )  # fmt: skip
        if is_fresh:
            temperature = temperature or max(INITIAL_TEMPERATURE[loss], 1 / limit)
            bias = INITIAL_LOGIT_BIAS if bias is None else bias
        if scale_weight is None:
            scale_weight = self._add_scalar("logit_scale")
            self.is_trained = self._add_scalar("is_trained", trainable=False)
        if temperature is not None:
            scale_weight.assign(-math.log(temperature))
        if loss == "sigmoid" and bias_weight is None:
            bias_weight = self._add_scalar("logit_bias")
        if bias_weight is not None and bias is not None:
            bias_weight.assign(bias)
        self.loss = loss
        self.logit_scale = scale_weight
        self.logit_bias = bias_weight if loss == "sigmoid" else None
        scale = math.exp(ops.convert_to_numpy(scale_weight))
        self.max_logit_scale = scale if scale > limit * TOLERANCE else limit
        # Clip the weight itself. Otherwise it could drift far above the limit and need
        # many steps to return.
        scale_weight.constraint = functools.partial(
            ops.minimum, math.log(self.max_logit_scale)
        )
        self.built = True

    @property
    def scale(self) -> Tensor:
        """The scale of the logits, 1 / temperature, at most `max_logit_scale`."""
        # The clip is a straight-through estimator: gradients can still lower a scale
        # above the limit (from averaged or loaded weights).
        log_scale = ops.cast(ops.convert_to_tensor(self.logit_scale), "float32")
        clipped = ops.minimum(log_scale, math.log(self.max_logit_scale))
        return ops.exp(log_scale + ops.stop_gradient(clipped - log_scale))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "loss": self.loss,
            "initial_temperature": self.initial_temperature,
            "initial_logit_bias": self.initial_logit_bias,
            "max_logit_scale": self.max_logit_scale,
        }

    def get_build_config(self) -> None:
        # The model that the head is part of settles it.
        return None

    def __reduce__(self):
        # For `copy` and `pickle`. Keras would load it without its model.
        if self.built:
            raise TypeError(
                "`head` must be copied together with its model: "
                f"`copy.deepcopy(model)`. Received: head={self.name}"
            )
        return super().__reduce__()

    def _add_scalar(self, name, trainable=True):
        return self.add_weight(
            shape=(),
            initializer="zeros",
            dtype="float32",
            autocast=False,
            trainable=trainable,
            name=name,
        )


def as_head(head: Any, loss: str | None) -> ContrastiveHead:
    """Returns a `ContrastiveHead`: a new one, or one that fits the loss."""
    if not isinstance(head, ContrastiveHead):
        return ContrastiveHead(loss, name="head")
    if loss is not None and loss != (head.loss or loss):
        raise ValueError(
            f"`loss` must match `head`, or be None. Received: loss={loss!r}, "
            f"head.loss={head.loss!r}"
        )
    head.loss = head.loss or loss
    return head
