import math
import types
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_integer, check_range
from keras_cluster_mask.distribution.replicas import assign_equal
from keras_cluster_mask.encoders.class_attention import ClassAttention
from keras_cluster_mask.encoders.families import BLOCKS
from keras_cluster_mask.encoders.resizing import (
    copy_with,
    resize_positions,
    with_image_size,
)
from keras_cluster_mask.encoders.surgery import (
    data_format_of,
    find_embedding_layer,
    number_positions,
    position_tables,
)
from keras_cluster_mask.masking.selection import add_state
from keras_cluster_mask.training.layers import (
    MadeOfParts,
    all_layers,
    merged_weights,
    saved_weights,
)
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class MomentumEncoder(MadeOfParts, keras.layers.Layer):
    """An exponential moving average (EMA) of a vision transformer, as a teacher.

    This is the teacher of `kcm.AttentiveMasking`. It is not trained. Each update moves
    its weights towards the weights of the encoder that it follows:

        teacher = momentum * teacher + (1 - momentum) * encoder

    The momentum is constant, or rises from `momentum` to `final_momentum` along a half
    cosine over `steps` updates. Weights are averaged in float32, whatever the compute
    dtype of the encoder. All layers run in inference mode.

    The teacher starts with the current weights of `encoder`. It follows the encoder
    that its masking is inserted into, by `kcm.with_masking` or
    `kcm.ContrastiveModel.from_backbone`, or the encoder given to `follow`. The followed
    encoder is not part of the teacher: a saved teacher contains only its own weights.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    teacher = kcm.models.MomentumEncoder(backbone.vision_encoder, momentum=0.99)
    teacher.follow(backbone.vision_encoder)
    # A step of training changes the backbone, and then:
    teacher.update()
    attention = teacher.attention(np.random.rand(2, 32, 32, 3))  # (2, 16)
    ```

    Args:
        encoder: A vision transformer with a class token and weights in float32:
            keras_hub's `CLIPVisionEncoder`, `MetaCLIP2VisionEncoder`, `ViTBackbone`,
            `DeiTBackbone` or `DINOV2Backbone`, or a functional Keras model around one.
        momentum: Float in `[0, 1]`, the momentum of the first update.
        final_momentum: Float in `[0, 1]`, the momentum after `steps` updates. Requires
            `steps`.
        steps: Integer, the number of updates over which the momentum rises. `None`
            keeps it at `momentum`.
        image_size: Integer or `(height, width)` in pixels, divisible by the patch size.
            The teacher reads images resized to this size (bilinear, antialiased), with
            position embeddings resized as by `kcm.models.with_image_size`. Half the
            size costs about a quarter. `None` does not resize images.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name`.

    Call arguments:
        images: `(batch, H, W, C)` tensor, or channels first, normalized for the
            encoder.

    Returns:
        The attention of the class token to each patch, see `attention`.

    Attributes:
        patch_size: Tuple `(height, width)`, in pixels.
        grid: Tuple `(rows, columns)`, the grid of patches that the teacher sees.
        step: Integer weight, the number of updates so far.

    Raises:
        ValueError: If the encoder has no class token, is of an unknown kind, cannot
            take images of `image_size`, or keeps weights in half precision.

    Reference:
        - [Momentum Contrast for Unsupervised Visual Representation Learning](
          https://arxiv.org/abs/1911.05722)
        - [Attentive Mask CLIP](https://arxiv.org/abs/2212.08653), and its [code](
          https://github.com/microsoft/A-CLIP), which starts at a momentum of 0.996 and
          updates before each forward pass.
    """

    _settings = ("momentum", "final_momentum", "steps", "image_size")
    # Each replica computes the same update of the same weights, so no averaging over
    # replicas is needed.
    equal_on_replicas = True

    def __init__(
        self,
        encoder: keras.Model,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        steps: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        **kwargs: Any,
    ):
        # Weights are read and written in their own dtype.
        kwargs.setdefault("dtype", "float32")
        super().__init__(autocast=False, **kwargs)
        check_range("momentum", momentum, 0, 1)
        check_range("final_momentum", final_momentum, 0, 1)
        if steps is None and final_momentum != 1:
            raise ValueError(
                "`final_momentum` needs `steps`, the number of updates after which it "
                f"is reached. Received: final_momentum={final_momentum}, steps=None"
            )
        self.momentum = float(momentum)
        self.final_momentum = float(final_momentum)
        self.steps = check_integer("steps", steps, or_none=True)
        self.image_size = image_size
        ClassAttention(encoder)
        if any(getattr(layer, "lora_enabled", False) for layer in all_layers(encoder)):
            raise ValueError(
                "`encoder` must have no LoRA yet: enable LoRA afterwards, or save and "
                "load the model first, which merges it. "
                f"Received: encoder={encoder.name}"
            )

        # === The copy ===
        # These hold the copy and the followed encoder in objects that Keras does not
        # look into, so that their layers are no sublayers. Then the copy's layers stay
        # frozen, its blocks are not mistaken for blocks of the encoder, and each weight
        # is saved once.
        # The copy's weights have paths of their own, by which Keras lists weights.
        with keras.name_scope(self.name):
            self._attention = ClassAttention(_copy(encoder, image_size))
        self._followed = None
        self.patch_size, self.grid = self._attention.patch_size, self._attention.grid
        self.data_format = data_format_of(self._attention.encoder)
        for weight in self._attention.encoder.weights:
            weight.trainable = False
        self.copied_weights = self._attention.encoder.weights
        self.step = add_state(self, "step", 0, "int32")
        self.built = True

    # === Attention of the teacher ===

    def attention(self, images: Tensor) -> Tensor:
        """Computes how much the class token attends to each patch.

        This is the mean of the softmax attention over all layers and heads. The columns
        of the class token and of other non-patch tokens are dropped. The rest is not
        rescaled to a sum of 1.

        Args:
            images: `(batch, H, W, C)` tensor, or channels first, normalized for the
                encoder.

        Returns:
            `(batch, N)` float32 tensor without gradients, N patches of `grid` in
            row-major order.
        """
        return self(images)

    def call(self, images: Tensor, training: bool | None = None) -> Tensor:
        images = ops.convert_to_tensor(images)
        if self.image_size is not None:
            images = ops.image.resize(
                ops.cast(images, "float32"),
                self._attention.image_size,
                interpolation="bilinear",
                antialias=True,
                data_format=self.data_format,
            )
        images = ops.stop_gradient(images)
        attention = self._attention(images)
        # In Keras, a layer that gets no `training` argument uses the value of the last
        # call. So the value of the step is restored.
        restore = keras.layers.Identity(autocast=False, dtype="float32")
        restore(images, training=training)
        return ops.stop_gradient(attention)

    # === Updates of the teacher ===

    def follow(self, encoder: keras.Model) -> None:
        """Sets the encoder that `update` moves the teacher towards.

        If the teacher already follows `encoder` or a part of it, such as its backbone,
        nothing changes.

        Args:
            encoder: A vision transformer with weights of the teacher's shapes, in the
                same order. Position embeddings may be for another image size, and
                further weights may follow, such as a pooling's.

        Raises:
            ValueError: If the weights do not match, or the teacher already follows
                other weights.
        """
        if self._followed is None:
            pairs = self._match(encoder)
            self._followed = types.SimpleNamespace(encoder=encoder, pairs=pairs)
            return
        theirs = {id(v) for v in encoder.weights}
        if any(id(source) not in theirs for _, source, _ in self._followed.pairs):
            raise ValueError(
                f"`{self.name}` follows another encoder already: make a "
                "`MomentumEncoder`, and a masking, for each encoder. "
                f"Received: encoder={encoder.name}"
            )

    def check_ready(self) -> None:
        """Raises an error if `update` has no encoder to follow."""
        if self._followed is None:
            raise ValueError(
                f"`{self.name}` must follow the encoder that is trained. Put its "
                "masking into that encoder by `kcm.with_masking`, or call "
                "`teacher.follow(encoder)`. Received: a teacher that follows no encoder"
            )

    def update(self) -> None:
        """Moves the weights towards the encoder that the teacher follows.

        `kcm.AttentiveMasking` calls it once in each step of training.
        """
        self.check_ready()
        share = self._share_of_encoder()
        merged = merged_weights(self._followed.encoder)
        for target, source, resize in self._followed.pairs:
            source = merged.get(id(source), source)
            new = ops.stop_gradient(ops.cast(source, "float32"))
            if resize is not None:
                new = ops.matmul(resize, new)
            old = ops.convert_to_tensor(target)
            assign_equal(target, old + share * (new - old))
        self.step.assign(self.step + 1)

    def _share_of_encoder(self):
        """Returns `1 - momentum`, without the rounding of a number close to 1."""
        if self.steps is None:
            return 1.0 - self.momentum
        progress = ops.minimum(ops.cast(self.step, "float32") / self.steps, 1.0)
        rest = 0.5 * (1.0 + ops.cos(math.pi * progress))
        return 1.0 - self.final_momentum + (self.final_momentum - self.momentum) * rest

    def _match(self, encoder):
        """Returns triples: own weight, followed weight, resize matrix or `None`."""
        # An encoder may have further weights at its end, such as a pooling's.
        own = self.copied_weights
        theirs = saved_weights(encoder)[: len(own)]
        num_blocks = sum(type(x).__name__ in BLOCKS for x in all_layers(encoder))
        tables = self._resized_tables(encoder)
        # Other weights, such as position ids, do not change.
        pairs = [
            (target, *tables.get(id(target), (source, None)))
            for target, source in zip(own, theirs)
            if keras.backend.is_float_dtype(target.dtype)
        ]
        counts = [len(own), len(self._attention.blocks)]
        if counts == [len(theirs), num_blocks] and all(
            resize is not None or target.shape == source.shape
            for target, source, resize in pairs
        ):
            return pairs
        raise ValueError(
            "`teacher` must be a copy of the encoder that it follows, of the same "
            "shapes: make it by `MomentumEncoder(encoder)`, or call `teacher.follow` "
            "on the part of the encoder that it was made from. Received: a teacher of "
            f"{self._attention.encoder.count_params()} numbers, encoder={encoder.name} "
            f"of {encoder.count_params()}"
        )

    def _resized_tables(self, encoder):
        """Returns the followed weight and the resize matrix, by id of own table."""
        if self.image_size is None:
            return {}
        old_grid = ClassAttention(encoder).grid
        if old_grid == self.grid:
            return {}
        source = position_tables(find_embedding_layer(encoder))[-1]
        table = np.eye(source.shape[-2], dtype="float32")
        resize = resize_positions(table, old_grid, self.grid)
        tables = position_tables(find_embedding_layer(self._attention.encoder))
        return {id(table): (source, resize) for table in tables}

    def get_config(self) -> dict[str, Any]:
        encoder = keras.saving.serialize_keras_object(self._attention.encoder)
        return {**super().get_config(), "encoder": encoder}


def _copy(encoder, image_size):
    """Copies an encoder and its weights, for images of `image_size` if given."""
    if any(
        keras.backend.is_float_dtype(v.dtype) and v.dtype != "float32"
        for v in encoder.weights
    ):
        raise ValueError(
            "`encoder` must keep its weights in float32, as in half precision the "
            "steps of a moving average are rounded to nothing: use the dtype "
            f"'mixed_bfloat16'. Received: encoder={encoder.name}, dtype="
            f"{encoder.dtype_policy.name}"
        )
    if image_size is not None:
        return with_image_size(encoder, image_size)
    # keras_hub's configs omit the data format.
    is_backbone = hasattr(encoder, "image_shape")
    changes = {"data_format": data_format_of(encoder)} if is_backbone else {}
    try:
        copy = copy_with(encoder, "vision_encoder", changes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`encoder` cannot be copied by its configuration: pass its backbone, "
            f"and call `teacher.follow(backbone)`. Received: encoder={encoder.name}"
        ) from error
    number_positions(find_embedding_layer(copy))
    return copy
