import math
from typing import Any

import keras
from keras import ops

from keras_cluster_mask.checks import check_choice, is_positive
from keras_cluster_mask.types import Tensor

INITIAL_TEMPERATURE = {"softmax": 0.07, "sigmoid": 0.1}
INITIAL_LOGIT_BIAS = -10.0


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ContrastiveHead(keras.layers.Layer):
    """Projects the features of two encoders and scales their similarities to logits.

    The scale of the logits is 1 / temperature; the sigmoid loss adds a bias. Part of a
    `ContrastiveModel`, which makes it from its arguments.

    Args:
        loss: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP).
        projection_dim: Integer, the width of the common space. `None` takes the
            features as they are.
        initial_temperature: Float. Defaults to 0.07 for softmax and 0.1 for sigmoid.
        initial_logit_bias: Float. Defaults to -10. For the sigmoid loss.
        max_logit_scale: Float. The scale never exceeds it.
        image_projection: A layer to use instead of a new projection.
        text_projection: A layer to use instead of a new projection.
        logit_scale: A variable, the logarithm of the scale, to use instead of a new
            one.
        logit_bias: A variable to use instead of a new one.
        **kwargs: Arguments of `keras.layers.Layer`.

    Parts that were passed in are not in the configuration: the enclosing model saves
    them.

    Attributes:
        image_projection: Layer or `None`.
        text_projection: Layer or `None`.
        logit_scale: float32 variable, the logarithm of the scale.
        logit_bias: float32 variable, or `None` for softmax.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
    """

    def __init__(
        self,
        loss: str = "softmax",
        projection_dim: int | None = None,
        initial_temperature: float | None = None,
        initial_logit_bias: float | None = None,
        max_logit_scale: float = 100.0,
        image_projection: keras.layers.Layer | None = None,
        text_projection: keras.layers.Layer | None = None,
        logit_scale: keras.Variable | None = None,
        logit_bias: keras.Variable | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        # Projections cast for themselves.
        self.autocast = False
        _check_options(loss, initial_temperature, initial_logit_bias, max_logit_scale)
        self.loss = loss
        self.projection_dim = projection_dim
        self.initial_temperature = initial_temperature
        self.initial_logit_bias = initial_logit_bias
        self.max_logit_scale = float(max_logit_scale)
        if projection_dim is not None:
            image_projection, text_projection = (
                keras.layers.Dense(
                    projection_dim, use_bias=False, dtype=self.dtype_policy, name=name
                )
                for name in ("image_projection", "text_projection")
            )
        self.image_projection = image_projection
        self.text_projection = text_projection
        if logit_scale is None:
            temperature = initial_temperature or INITIAL_TEMPERATURE[loss]
            logit_scale = self._add_scalar("logit_scale", -math.log(temperature))
        if loss == "softmax":
            logit_bias = None
        elif logit_bias is None:
            is_given = initial_logit_bias is not None
            bias = initial_logit_bias if is_given else INITIAL_LOGIT_BIAS
            logit_bias = self._add_scalar("logit_bias", bias)
        self.logit_scale, self.logit_bias = logit_scale, logit_bias
        # Clips the weight itself, or it could drift far above the limit and would need
        # many steps to return.
        self.logit_scale.constraint = _AtMost(math.log(self.max_logit_scale))
        self.built = True

    def build_projections(
        self, image_width: int | None, text_width: int | None
    ) -> None:
        """Builds the projections, or checks that the features need none.

        Args:
            image_width: Integer, or `None` if it is not known yet.
            text_width: Integer, or `None` if it is not known yet.
        """
        widths = image_width, text_width
        if None in widths:
            return
        if self.image_projection is None and image_width != text_width:
            raise ValueError(
                "`image_encoder` and `text_encoder` must return features of the "
                "same width; or pass `projection_dim` to map both to a common "
                f"one. Received: widths {image_width} and {text_width}"
            )
        projections = self.image_projection, self.text_projection
        for projection, width in zip(projections, widths):
            # Those of a backbone, or of a head that is used again, are built.
            if projection is not None and not projection.built:
                projection.build((None, width))

    def project_image(self, features: Tensor) -> Tensor:
        """Features of images in the common space, not normalized."""
        projection = self.image_projection
        return features if projection is None else projection(features)

    def project_text(self, features: Tensor) -> Tensor:
        """Features of texts in the common space, not normalized."""
        projection = self.text_projection
        return features if projection is None else projection(features)

    @property
    def scale(self) -> Tensor:
        """The scale of the logits, 1 / temperature, at most `max_logit_scale`."""
        # The clip passes gradients, so that a scale above the limit (of averaged or
        # loaded weights) is still trained back.
        log_scale = ops.cast(ops.convert_to_tensor(self.logit_scale), "float32")
        clipped = ops.minimum(log_scale, math.log(self.max_logit_scale))
        return ops.exp(log_scale + ops.stop_gradient(clipped - log_scale))

    @property
    def loss_weights(self) -> list[Tensor]:
        """What `losses.batch_loss` takes: the scale and, if there is one, the bias."""
        scale = self.scale
        return [scale] if self.logit_bias is None else [scale, self.logit_bias]

    def check_options(self, options: dict) -> None:
        """Raises an error for options that are not those of this head."""
        for name, value in options.items():
            if self.options[name] != value:
                raise ValueError(
                    f"`{name}` must be that of `head`, which defines it. Received: "
                    f"{name}={value!r}, head.{name}={self.options[name]!r}"
                )

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that a `ContrastiveModel` takes too, by name."""
        return {
            "loss": self.loss,
            "projection_dim": self.projection_dim,
            "initial_temperature": self.initial_temperature,
            "initial_logit_bias": self.initial_logit_bias,
            "max_logit_scale": self.max_logit_scale,
        }

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.options}

    def _add_scalar(self, name, value):
        return self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(value),
            dtype="float32",
            autocast=False,
            name=name,
        )


def l2_normalize(features):
    """Float32 rows of length 1, with a finite gradient at 0."""
    # `keras.ops.normalize` has a NaN gradient at a zero vector on JAX and torch.
    x = ops.cast(features, "float32")
    length = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return x * ops.rsqrt(ops.maximum(length, 1e-12))


def _check_options(loss, initial_temperature, initial_logit_bias, max_logit_scale):
    check_choice("loss", loss, tuple(INITIAL_TEMPERATURE))
    if not is_positive(max_logit_scale):
        raise ValueError(
            "`max_logit_scale` must be greater than 0. "
            f"Received: max_logit_scale={max_logit_scale}"
        )
    if initial_temperature is not None and not is_positive(initial_temperature):
        raise ValueError(
            "`initial_temperature` must be greater than 0. "
            f"Received: initial_temperature={initial_temperature}"
        )
    # Up to rounding, such as that of 1 / 49.
    largest = max_logit_scale * (1 + 1e-6)
    if initial_temperature is not None and 1 / initial_temperature > largest:
        raise ValueError(
            "`initial_temperature` must be at least 1 / `max_logit_scale`, below which "
            "the temperature cannot fall. Received: "
            f"initial_temperature={initial_temperature}, "
            f"max_logit_scale={max_logit_scale}"
        )
    if initial_logit_bias is not None and loss == "softmax":
        raise ValueError(
            "`initial_logit_bias` is for loss='sigmoid'. "
            f"Received: initial_logit_bias={initial_logit_bias}, loss='softmax'"
        )


class _AtMost(keras.constraints.Constraint):
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, weight):
        return ops.minimum(weight, ops.cast(self.limit, weight.dtype))
