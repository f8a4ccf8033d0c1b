"""A vision transformer with patch masking."""

import math
from typing import Any

import keras
from keras import ops, tree

from keras_cluster_mask.checks import sides_of
from keras_cluster_mask.encoders.families import num_prefix_tokens
from keras_cluster_mask.encoders.hidden_tokens import check_blocks, propagate_masks
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
from keras_cluster_mask.training.layers import (
    MadeOfParts,
    Untracked,
    all_layers,
    as_functional,
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
            have different prefix tokens and patch sizes: neither is written into it.
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
    is_unknown = known is None
    if is_unknown:
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
    if is_unknown or masking.hides_tokens:
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
        blocks: The part of the encoder from tokens to its output.
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
        # The numbers of patches by the shapes of images, the same in all steps.
        self._counts: dict[str, int] = {}

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
        key = str(tuple(images.shape[1:]))
        if key not in self._counts:
            self._counts[key] = self._count(images)
        return self._counts[key]

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
    def blocks(self) -> keras.Model:
        return self._models.blocks

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
