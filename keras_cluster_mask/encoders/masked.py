"""A vision transformer with patch masking."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_cluster_mask.checks import sides_of
from keras_cluster_mask.encoders.families import IMAGE_FAMILIES, num_prefix_tokens
from keras_cluster_mask.encoders.rotary_positions import rotary_tables
from keras_cluster_mask.encoders.surgery import (
    count_constant_tokens,
    data_format_of,
    find_embedding_layer,
    image_shape_of,
    number_positions,
    split_at,
    stem_of,
)
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.masking.patch_grid import grid_shape
from keras_cluster_mask.masking.selection import PutMask
from keras_cluster_mask.training.layers import (
    MadeOfParts,
    Untracked,
    all_layers,
    as_functional,
    state_variables,
)
from keras_cluster_mask.types import Tensor


def with_masking(
    encoder: keras.Model, masking: PatchMasking, layer: str | None = None
) -> "MaskedEncoder":
    """Inserts a masking after the embedding layer of a vision transformer.

    The returned model shares all weights with `encoder`: training one trains
    the other. At inference both give the same output.

    Example:

    ```python
    encoder = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3), patch_size=8, num_layers=2, num_heads=2,
        hidden_dim=32, mlp_dim=64,
    )
    masked = kcm.with_masking(encoder, kcm.ClusterMasking(patch_size=8))
    images = np.random.rand(2, 32, 32, 3)
    masked(images).shape  # (2, 17, 32)
    masked(images, training=True).shape  # (2, 9, 32)
    ```

    Args:
        encoder: A functional Keras model that takes images: keras_hub's
            `CLIPVisionEncoder`, `MetaCLIP2VisionEncoder`, `SigLIPVisionEncoder` (also
            SigLIP 2), `ViTBackbone`, `DeiTBackbone`, `DINOV2Backbone`, `DINOV3Backbone`
            or `BLIP2VisionEncoder`, or a model of your own.
        masking: A `PatchMasking` layer. It can be used in several encoders, which may
            have different prefix tokens. Without a `patch_size`, it keeps the patch
            size of the first encoder.
        layer: String. The name of the layer that outputs the embedded tokens,
            `(batch, tokens, dim)`, after the position embedding. Not needed for the
            encoders above.

    Returns:
        A `MaskedEncoder`, a Keras model with the inputs and outputs of
        `encoder`.

    Raises:
        ValueError: If the layer is unknown (the candidates are listed) or comes before
            the position embedding, if the masking does not fit the patches and
            `num_prefix_tokens` of the encoder, or if the masking hides tokens with a
            Keras mask that the encoder does not honor.
    """
    if not isinstance(masking, PatchMasking):
        raise ValueError(
            "`masking` must be a `PatchMasking` layer. "
            f"Received: masking={masking} of type {type(masking).__name__}"
        )
    if any(isinstance(x, PatchMasking) for x in all_layers(encoder)):
        raise ValueError(
            "`encoder` must have no masking yet. To replace the masking of a masked "
            "encoder, pass `masked.encoder`. Received: "
            f"encoder={encoder.name} of type {type(encoder).__name__}"
        )
    encoder = as_functional(encoder)
    embedding = find_embedding_layer(encoder, layer)
    number_positions(encoder)
    given, known = masking.num_prefix_tokens, num_prefix_tokens(embedding)
    if known is None:
        known = count_constant_tokens(encoder, stem_of(encoder, embedding.output))
    if None not in (given, known) and given != known:
        raise ValueError(
            f"`num_prefix_tokens` must be {known}, the number of tokens that "
            f"`{encoder.name}` has before its patches, or None to take it from the "
            f"encoder. Received: num_prefix_tokens={given}"
        )
    masked = MaskedEncoder(encoder, masking, layer, known if given is None else given)
    shape = image_shape_of(encoder)
    if None not in shape:
        # It raises an error unless the masking fits the patches.
        masked.num_patches(keras.KerasTensor((1, *shape)))
    check_blocks(masked)
    return masked


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class MaskedEncoder(MadeOfParts, keras.Model):
    """A vision transformer with patch masking, made by `kcm.with_masking`.

    Args:
        encoder: A functional Keras model that takes images.
        masking: A `PatchMasking` layer.
        layer: String or `None`, the name of the embedding layer.
        num_prefix_tokens: Integer, the number of tokens of the encoder that are not
            patches. `None` if it is not known: the masking must then have a
            `patch_size` or a `grid`.
        **kwargs: Arguments of `keras.Model`.

    Call arguments:
        inputs: Images, in the form that `encoder` takes: a tensor, or a dictionary with
            a tensor.
        training: Python boolean. Patches are left out only if it is true. A frozen
            encoder runs as in inference, on the kept patches.
        noise: `(batch, N)` float32 tensor for the masking. Drawn if not given.

    Attributes:
        encoder: The encoder, which shares its weights with this model.
        masking: The masking.
        embedding_layer: The layer of the encoder that returns the embedded tokens.
        stem: The part of the encoder from images to tokens.
    """

    _arguments = ("encoder", "masking", "layer", "num_prefix_tokens")

    def __init__(
        self,
        encoder: keras.Model,
        masking: PatchMasking,
        layer: str | None = None,
        num_prefix_tokens: int | None = None,
        **kwargs: Any,
    ):
        kwargs.setdefault("name", f"masked_{encoder.name}")
        super().__init__(**kwargs)
        # The masking must see the pixels unchanged; the encoder casts its own inputs.
        self.autocast = False

        # === Layers ===
        self.encoder = encoder
        self.masking = masking
        self.embedding_layer = find_embedding_layer(encoder, layer)

        # === Functional models ===
        stem, blocks = split_at(encoder, self.embedding_layer)
        if masking.hides_tokens:
            propagate_masks(blocks)
        tables = rotary_tables(encoder)
        positions = stem_of(encoder, tables) if tables else None
        # Keras would save every weight twice.
        self._models = Untracked(stem=stem, blocks=blocks, positions=positions)
        # The numbers of patches by the shapes of images.
        self._counts = Untracked()

        # === Config ===
        # `None` is saved unchanged, because keras_hub names layers by the encoder's
        # name after a reload.
        self.layer = layer
        self.num_prefix_tokens = num_prefix_tokens
        self.built = True

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        noise: Tensor | None = None,
    ) -> Any:
        if not training:
            return self.encoder(inputs, training=False)
        # A model trains on kept patches also where its encoder is frozen.
        training = bool(self.encoder.trainable_weights)
        models = self._models
        (images,) = tree.flatten(inputs)
        tokens = models.stem(images, training=training)
        tokens, indices = self.masking.keep(
            tokens, images, noise, self.num_prefix_tokens
        )
        if models.positions is not None:
            tables = models.positions(images)
            tokens = [tokens, *(ops.take(table, indices, axis=0) for table in tables)]
        return models.blocks(tokens, training=training)

    def num_patches(self, images: Tensor) -> int:
        """Returns the number of patches of each image; only the shape is read."""
        # The same in all steps.
        key, counts = str(tuple(images.shape[1:])), vars(self._counts)
        if key not in counts:
            counts[key] = self._count(images)
        return counts[key]

    def _count(self, images):
        layer, prefix = self.embedding_layer, self.num_prefix_tokens
        if num_prefix_tokens(layer) is None:
            num_tokens = self.stem.output.shape[1]
            num_tokens = num_tokens or self.stem.compute_output_shape(images.shape)[1]
        else:
            # Some embedding layers of keras_hub declare a shape that is off by one.
            sides = sides_of("patch_size", layer.patch_size)
            grid = grid_shape(images.shape, sides, data_format_of(self.encoder))
            num_tokens = math.prod(grid) + prefix
        return self.masking.count_patches(num_tokens, images, prefix)

    def embed_patches(self, images: Tensor) -> Tensor:
        """Computes the tokens that the masking selects from, in inference mode.

        Args:
            images: `(batch, H, W, C)` tensor, normalized.

        Returns:
            `(batch, prefix + N, dim)` tensor.
        """
        return self.stem(images, training=False)

    @property
    def stem(self) -> keras.Model:
        return self._models.stem

    @property
    def input(self) -> Any:
        return self.encoder.input

    @property
    def output(self) -> Any:
        return self.encoder.output

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.encoder.compute_output_shape(input_shape)


def unmasked(encoder):
    """Returns an encoder without the masking that `kcm.with_masking` inserted."""
    return encoder.encoder if isinstance(encoder, MaskedEncoder) else encoder


# === Layers that use the order of tokens, or let hidden ones through ===


# The visible patches in each sample of the test batch. Every patch is hidden in at
# least one sample.
VISIBLE = np.array([[1, 0] * 4, [0, 1] * 4, [1] * 6 + [0] * 2, [0] * 6 + [1] * 2], bool)


def check_blocks(masked):
    """Raises an error if the blocks of an encoder use hidden tokens, or their order.

    If the masking hides tokens, tests that attention and pooling honor Keras masks: if
    hidden tokens change, no visible output may change. If the order mattered in an
    encoder of an unknown kind, kept patches would get other positions than in the whole
    image. Encoders of keras_hub were tested.

    Args:
        masked: A `MaskedEncoder`.

    Raises:
        ValueError: If a visible output changes; or if a token, or a pooled feature,
            changes when patches are reversed.
    """
    if type(masked.encoder).__name__ in IMAGE_FAMILIES:
        return
    rng, (rows, count) = np.random.default_rng(0), VISIBLE.shape
    blocks, num_prefix = masked._models.blocks, masked.num_prefix_tokens
    # Assume a class token, which most encoders have.
    num_prefix = 1 if num_prefix is None else num_prefix
    sizes = num_prefix + count, count, count
    inputs = [
        rng.normal(size=(rows, n, x.shape[-1])) for n, x in zip(sizes, blocks.inputs)
    ]
    name = masked.encoder.name
    if masked.masking.hides_tokens:
        prefix = [(0, 0), (num_prefix, 0)]
        visible = np.pad(VISIBLE, prefix, constant_values=True)
        tokens, *rest = inputs
        changed = np.where(visible[:, :, None], tokens, 10.0 * tokens[:, ::-1] + 1.0)
        for one, other in _outputs(blocks, inputs, [changed, *rest], visible=visible):
            if one.ndim == 3 and one.shape[:2] == visible.shape:
                one, other = one[visible], other[visible]
            change = np.abs(one - other).max()
            if not change <= 1e-6 * max(1, np.abs(one).max()):
                raise ValueError(
                    f"`{name}` lets hidden tokens through: its layers do not honor "
                    "Keras masks, so threshold masking with hidden padding would not "
                    "hide anything. Use an exact budget (`min_mask_ratio=None`), or "
                    "let the padding take part (`hide_padding=False`). Received: "
                    f"encoder={name}, largest change of the output={change:.3g}"
                )
    if num_prefix_tokens(masked.embedding_layer) is not None:
        return
    # Sums in another order are rounded differently.
    is_rounded = any(x.compute_dtype != "float32" for x in all_layers(blocks))
    tolerance = 0.02 if is_rounded else 1e-4
    backwards = [
        np.concatenate([x[:, :-count], x[:, -count:][:, ::-1]], 1) for x in inputs
    ]
    for one, other in _outputs(blocks, inputs, backwards):
        # The same tokens, in whatever order, have the same sorted values.
        one, other = (np.sort(x, axis=1) if x.ndim > 2 else x for x in (one, other))
        if np.abs(one - other).mean() > tolerance * np.abs(one).mean():
            raise ValueError(
                "`layer` must be after the position embedding, but a later layer "
                "depends on the order of tokens. Received: "
                f"layer={masked.embedding_layer.name!r}, encoder={name}"
            )


def propagate_masks(blocks):
    """Makes every layer of a functional model propagate Keras masks of tokens."""
    for layer in all_layers(blocks):
        layer.supports_masking = True
    # A token mask has no meaning for pooled features: losses would use it as sample
    # weights.
    for layer in (blocks, *blocks.layers):
        if any(len(x.shape) != 3 for x in tree.flatten(layer.output)):
            layer.compute_mask = _no_mask


def _no_mask(inputs, previous_mask=None):
    return None


def _outputs(blocks, *inputs_of_runs, visible=None):
    """Returns pairs of outputs of `blocks` on two inputs, with random weights."""

    def run(inputs):
        # Use the dtype of the blocks, because a cast would lose the mask.
        inputs = [
            ops.convert_to_tensor(x, dtype=y.dtype)
            for x, y in zip(inputs, blocks.inputs)
        ]
        if visible is not None:
            inputs[0] = PutMask()(inputs[0], mask=ops.convert_to_tensor(visible))
        with random_weights(blocks):
            outputs = blocks(inputs if len(inputs) > 1 else inputs[0], training=False)
        outputs = tree.flatten(outputs)
        return [ops.convert_to_numpy(ops.cast(x, "float32")) for x in outputs]

    return zip(*map(run, inputs_of_runs))


def random_weights(model, signs=np.positive):
    """Returns a scope in which the weights of a model have random values.

    A zero weight (LayerScale, a fresh residual branch) would hide a leak that appears
    later in training.

    Args:
        model: A built Keras model.
        signs: Function that changes the signs of an array of values around zero.
    """
    # Larger weights repeat these values, because generating all of them takes ten times
    # as long. Their number is prime, so that rows differ.
    numbers = 0.1 * np.random.default_rng(0).standard_normal(65_537, "float32")
    values, shared, states = [], {}, {id(v) for v in state_variables(model)}
    for index, variable in enumerate(model.variables):
        if keras.backend.is_float_dtype(variable.dtype):
            # A large encoder is not copied: three tensors serve all weights of a shape,
            # so that query, key and value differ.
            is_state = id(variable) in states
            key = index % 3, variable.shape, variable.dtype, is_state
            if key not in shared:
                value = np.resize(np.roll(numbers, 997 * index), variable.shape)
                # A state may be a variance, which must be positive. A frozen weight
                # has values of both signs.
                value = np.abs(value) + 0.01 if is_state else signs(value)
                shared[key] = ops.convert_to_tensor(value, dtype=variable.dtype)
            values.append((variable, shared[key]))
    return keras.StatelessScope(state_mapping=values)
