import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_choice, check_integer, check_range
from keras_cluster_mask.types import Tensor

INITIAL_TEMPERATURE = {"softmax": 0.07, "sigmoid": 0.1}
INITIAL_LOGIT_BIAS = -10.0
# A scale may exceed its limit by rounding errors, such as in 1 / 49.
TOLERANCE = 1 + 1e-6


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ContrastiveHead(keras.layers.Layer):
    """Projects the features of two encoders and scales their similarities to logits.

    The scale of the logits is 1 / temperature; the sigmoid loss adds a bias. A
    `ContrastiveModel` makes a head from its own arguments, or takes a head with another
    temperature, bias or limit. A model of a keras_hub backbone uses the projections,
    temperature and bias of the backbone. The arguments can set the temperature and
    bias.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    head = kcm.models.ContrastiveHead(initial_temperature=0.05)
    model = kcm.ContrastiveModel.from_backbone(backbone, head=head)
    ```

    Args:
        loss: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP). Defaults to the loss of a
            backbone's family, or to `"softmax"` in other models.
        projection_dim: Integer, the width of the shared embedding space. `None` uses
            the features without a projection, or the projections of a backbone.
        projection: `"linear"`, without a bias, or `"mlp"`: a `Standardization`, one
            hidden layer of twice the width of the projection, GELU and dropout of 0.3.
            A `.keras` file does not hold the random state of dropout: the loaded model
            starts from a new one. A checkpoint holds this state.
        initial_temperature: Float. Defaults to 0.07 for softmax and 0.1 for sigmoid. A
            pre-trained backbone keeps its temperature.
        initial_logit_bias: Float, for the sigmoid loss. Defaults to -10.
        max_logit_scale: Float. The maximum scale. Defaults to 100, or to 1000 for a
            SigLIP backbone. If a backbone has a higher scale, its scale is the limit.
        **kwargs: Arguments of `keras.layers.Layer`. `dtype` is the dtype policy of the
            projections.

    Attributes:
        image_projection: Layer or `None`.
        text_projection: Layer or `None`.
        logit_scale: float32 variable, the logarithm of the scale. This and `logit_bias`
            exist once the head is part of a model.
        logit_bias: float32 variable, or `None` for softmax.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
    """

    # As in `MadeOfParts`.
    _settings = (
        "loss",
        "projection_dim",
        "projection",
        "initial_temperature",
        "initial_logit_bias",
        "max_logit_scale",
    )

    def __init__(
        self,
        loss: str | None = None,
        projection_dim: int | None = None,
        projection: str = "linear",
        initial_temperature: float | None = None,
        initial_logit_bias: float | None = None,
        max_logit_scale: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        # Projections cast their own inputs.
        self.autocast = False
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
        check_choice("projection", projection, ("linear", "mlp"))
        if projection != "linear" and projection_dim is None:
            raise ValueError(
                "`projection_dim` must be given for the projection 'mlp'. "
                f"Received: projection={projection!r}, projection_dim=None"
            )

        # === Config ===
        self.loss = loss
        self.projection_dim = check_integer(
            "projection_dim", projection_dim, or_none=True
        )
        self.projection = projection
        self.initial_temperature = initial_temperature
        self.initial_logit_bias = initial_logit_bias
        self.max_logit_scale = max_logit_scale

        # === Layers ===
        self.image_projection = self.text_projection = None
        if projection_dim is not None:
            self.image_projection, self.text_projection = (
                _projection(projection, projection_dim, self.dtype_policy, name)
                for name in ("image_projection", "text_projection")
            )
        self.logit_scale = self.logit_bias = None

    def settle(self, loss: str = "softmax", max_logit_scale: float = 100.0) -> None:
        """Sets the loss and the limit of the scale, unless they were given.

        Raises:
            ValueError: If the initial temperature or bias do not fit them.
        """
        self.loss = self.loss or loss
        self.max_logit_scale = float(self.max_logit_scale or max_logit_scale)
        smallest = 1 / (self.max_logit_scale * TOLERANCE)
        if self.initial_temperature is not None and self.initial_temperature < smallest:
            raise ValueError(
                "`initial_temperature` must be at least 1 / `max_logit_scale`, below "
                "which the temperature cannot fall. Received: "
                f"initial_temperature={self.initial_temperature}, "
                f"max_logit_scale={self.max_logit_scale}"
            )
        if self.initial_logit_bias is not None and self.loss == "softmax":
            raise ValueError(
                "`initial_logit_bias` is for loss='sigmoid'. Received: "
                f"initial_logit_bias={self.initial_logit_bias}, loss='softmax'"
            )

    def build(self, image_features_shape: Any, text_features_shape: Any) -> None:
        shapes = image_features_shape, text_features_shape
        widths = {shape[-1] for shape in shapes}
        projections = self.image_projection, self.text_projection
        if None in projections and None not in widths and len(widths) > 1:
            raise ValueError(
                "`image_encoder` and `text_encoder` must return features of the "
                "same width; or pass `projection_dim` to map both to a common "
                f"one. Received: widths {shapes[0][-1]} and {shapes[1][-1]}"
            )
        for projection, shape in zip(projections, shapes):
            # An encoder may learn its width when it is called. The projections of a
            # backbone are already built.
            if None not in (projection, shape[-1]) and not projection.built:
                projection.build((None, shape[-1]))
        if self.built:
            # The head of another model: Keras compares the widths.
            self(*(keras.KerasTensor((None, shape[-1])) for shape in shapes))
            return
        self.settle()
        if self.logit_scale is None:
            temperature = self.initial_temperature or INITIAL_TEMPERATURE[self.loss]
            self.logit_scale = self._add_scalar("logit_scale", -math.log(temperature))
        if self.logit_bias is None and self.loss == "sigmoid":
            given = self.initial_logit_bias
            bias = INITIAL_LOGIT_BIAS if given is None else given
            self.logit_bias = self._add_scalar("logit_bias", bias)
        scale = math.exp(ops.convert_to_numpy(self.logit_scale))
        if scale > self.max_logit_scale * TOLERANCE:
            self.max_logit_scale = scale
        # Clip the weight itself. Otherwise it could drift far above the limit and need
        # many steps to return.
        self.logit_scale.constraint = functools.partial(
            ops.minimum, math.log(self.max_logit_scale)
        )

    def get_build_config(self) -> None:
        # The model that the head is part of builds it.
        return None

    def set_scaling(
        self, statistics: Callable[[str], tuple] | None = None
    ) -> list["Standardization"]:
        """Fixes the scaling of features in projections that have one, once.

        Args:
            statistics: Function from `"image"` or `"text"` to the mean and the
                deviation of the features. `None` does not scale features.

        Returns:
            List of the layers whose scaling was not fixed before.
        """
        scaled = []
        for name in ("image", "text"):
            projection = getattr(self, f"{name}_projection")
            for layer in getattr(projection, "layers", ()):
                is_scaling = isinstance(layer, Standardization) and layer.built
                if is_scaling and not ops.convert_to_numpy(layer.is_set):
                    layer.set(*(statistics(name) if statistics else (0.0, 1.0)))
                    scaled.append(layer)
        return scaled

    def call(self, image_features: Tensor, text_features: Tensor) -> tuple:
        projections = self.image_projection, self.text_projection
        both = image_features, text_features
        return tuple(x if f is None else f(x) for f, x in zip(projections, both))

    @property
    def scale(self) -> Tensor:
        """The scale of the logits, 1 / temperature, at most `max_logit_scale`."""
        # The clip is a straight-through estimator: gradients can still lower a scale
        # above the limit (from averaged or loaded weights).
        log_scale = ops.cast(ops.convert_to_tensor(self.logit_scale), "float32")
        clipped = ops.minimum(log_scale, math.log(self.max_logit_scale))
        return ops.exp(log_scale + ops.stop_gradient(clipped - log_scale))

    def get_config(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in self._settings}
        return {**super().get_config(), **options}

    def __reduce__(self):
        # For `copy` and `pickle`. Keras would load it without the model that builds it.
        if self.built:
            raise TypeError(
                "The head of a model is copied with its model: `copy.deepcopy(model)`. "
                f"Received: head={self.name}"
            )
        return super().__reduce__()

    def _add_scalar(self, name, value):
        return self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(value),
            dtype="float32",
            autocast=False,
            name=name,
        )


def _projection(kind, width, dtype, name):
    if kind == "linear":
        return keras.layers.Dense(width, use_bias=False, dtype=dtype, name=name)
    layers = [
        Standardization(dtype=dtype, name="standardization"),
        keras.layers.Dense(2 * width, activation="gelu", dtype=dtype, name="hidden"),
        keras.layers.Dropout(0.3, dtype=dtype, name="dropout"),
        keras.layers.Dense(width, use_bias=False, dtype=dtype, name="output"),
    ]
    return keras.Sequential(layers, name=name)


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class Standardization(keras.layers.Layer):
    """Scales features to a mean of 0 and a deviation of 1.

    The scaling is fixed. It is the same in training and evaluation, and does not depend
    on the batch. The first `ContrastiveModel.fit` sets it: on `TowerFeatures` to their
    statistics, on other data to no scaling.

    Attributes:
        mean: `(width,)` float32 variable, not trained.
        deviation: `(width,)` float32 variable, not trained.
        is_set: `()` float32 variable, 1 once the scaling is fixed.
    """

    equal_on_replicas = True

    def __init__(self, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)

    def get_config(self) -> dict[str, Any]:
        # The automatic one of Keras fails for a dtype policy.
        return super().get_config()

    def build(self, input_shape):
        options, shape = {"trainable": False, "dtype": "float32"}, input_shape[-1:]
        self.mean = self.add_weight(shape, "zeros", name="mean", **options)
        self.deviation = self.add_weight(shape, "ones", name="deviation", **options)
        self.is_set = self.add_weight((), "zeros", name="is_set", **options)

    def call(self, features: Tensor) -> Tensor:
        # In lower precision, features would be rounded before the mean is subtracted.
        return (ops.cast(features, "float32") - self.mean) / self.deviation

    def set(self, mean: Any, deviation: Any) -> None:
        """Sets the scaling, which then never changes."""
        shape = tuple(self.mean.shape)
        self.mean.assign(np.broadcast_to(mean, shape))
        self.deviation.assign(np.broadcast_to(deviation, shape))
        self.is_set.assign(1.0)


def as_head(head, loss, projection_dim=None, dtype=None):
    """Returns a `ContrastiveHead`: a new one, or one that fits the other arguments."""
    if not isinstance(head, ContrastiveHead):
        if head not in ("linear", "mlp"):
            raise ValueError(
                "`head` must be 'linear', 'mlp' or a `ContrastiveHead`. "
                f"Received: head={head!r}"
            )
        return ContrastiveHead(loss, projection_dim, head, dtype=dtype, name="head")
    policy = None if dtype is None else keras.dtype_policies.get(dtype).name
    both = {
        "projection_dim": (projection_dim, head.projection_dim),
        "dtype": (policy, head.dtype_policy.name),
        "loss": (loss, head.loss or loss),
    }
    for name, (value, own) in both.items():
        if value not in (None, own):
            raise ValueError(
                f"`{name}` must match `head`, or be None. Received: {name}={value!r}, "
                f"head.{name}={own!r}"
            )
    head.loss = head.loss or loss
    return head
