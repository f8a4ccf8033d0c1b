import keras
from keras import ops, tree

from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models.embedding_layer import (
    find_embedding_layer,
    number_positions,
    split_at,
)
from keras_cluster_mask.models.leak_probe import check_no_leak


def with_masking(encoder, masking, layer=None):
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
        encoder: A functional Keras model from images to anything: keras_hub's
            `CLIPVisionEncoder`, `ViTBackbone`, `SigLIPVisionEncoder`,
            `DINOV2Backbone`, or a model of your own.
        masking: A `PatchMasking` layer.
        layer: String. The name of the layer whose output are the embedded
            tokens, `(batch, tokens, dim)`. Known for the encoders above.

    Returns:
        A `MaskedEncoder`, a Keras model with the inputs and outputs of
        `encoder`.

    Raises:
        ValueError: If the layer is unknown (the candidates are listed), or if
            the masking hides tokens behind a Keras mask and the encoder lets
            them through.
    """
    return MaskedEncoder(encoder, masking, layer)


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class MaskedEncoder(keras.Model):
    """A vision transformer with a masking in it. Made by `kcm.with_masking`.

    Args:
        encoder: A functional Keras model from images to anything.
        masking: A `PatchMasking` layer.
        layer: String or `None`, the name of the embedding layer.
        **kwargs: Arguments of `keras.Model`.

    Call arguments:
        inputs: Images, or a dictionary of them, as `encoder` takes them.
        training: Python boolean. Patches are left out only if it is true.
        noise: `(batch, N)` float32 tensor for the masking. Drawn if not given.

    Attributes:
        encoder: The encoder, which shares its weights with this model.
        masking: The masking.
    """

    def __init__(self, encoder, masking, layer=None, **kwargs):
        kwargs.setdefault("name", f"masked_{encoder.name}")
        super().__init__(**kwargs)
        # The masking must see the pixels as they come; the encoder casts for itself.
        self.autocast = False
        if not isinstance(masking, PatchMasking):
            raise ValueError(
                "`masking` must be a `PatchMasking` layer. "
                f"Received: masking={masking} of type {type(masking).__name__}"
            )
        self.encoder = encoder
        self.masking = masking
        self.embedding_layer = find_embedding_layer(encoder, layer)
        number_positions(self.embedding_layer)
        # In a function rather than in attributes: Keras would track and save the
        # parts, and with them every weight a second time.
        stem, blocks = split_at(encoder, self.embedding_layer)
        self._parts = lambda: (stem, blocks)

        if masking.num_prefix_tokens is None:
            masking.num_prefix_tokens = _count_prefix_tokens(encoder, stem)
        if masking.hides_tokens:
            check_no_leak(encoder.name, blocks)
        self.built = True

    def call(self, inputs, training=None, noise=None):
        if not training:
            return self.encoder(inputs, training=False)
        stem, blocks = self._parts()
        tokens = stem(inputs, training=True)
        (images,) = tree.flatten(inputs)
        tokens = self.masking(tokens, images=images, training=True, noise=noise)
        return blocks(tokens, training=True)

    def embed_patches(self, images):
        """The tokens that the masking chooses among, as they are in inference.

        Args:
            images: `(batch, H, W, C)` tensor, normalised.

        Returns:
            `(batch, prefix + N, dim)` tensor.
        """
        stem, _ = self._parts()
        inputs = tree.map_structure(lambda _: images, self.encoder.input)
        return stem(inputs, training=False)

    @property
    def input(self):
        return self.encoder.input

    @property
    def output(self):
        return self.encoder.output

    def compute_output_shape(self, input_shape):
        return self.encoder.compute_output_shape(input_shape)

    def get_config(self):
        return {
            "name": self.name,
            "encoder": keras.saving.serialize_keras_object(self.encoder),
            "masking": keras.saving.serialize_keras_object(self.masking),
            "layer": self.embedding_layer.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for key in ("encoder", "masking"):
            config[key] = keras.saving.deserialize_keras_object(
                config[key], custom_objects=custom_objects
            )
        return cls(**config)


def _count_prefix_tokens(encoder, stem):
    """How many tokens of an encoder are no patches, or `None` if it cannot be told."""
    patch_size = getattr(encoder, "patch_size", None)
    (images,) = tree.flatten(encoder.input)
    if patch_size is None or None in images.shape[1:]:
        return None
    p, q = patch_size if isinstance(patch_size, (tuple, list)) else (patch_size,) * 2
    first = keras.config.image_data_format() == "channels_first"
    if getattr(encoder, "data_format", None):
        first = encoder.data_format == "channels_first"
    height, width = images.shape[2:4] if first else images.shape[1:3]
    # Tried out, since the declared shape of some embedding layers is off by one.
    tokens = stem(
        tree.map_structure(lambda x: ops.zeros((1, *x.shape[1:])), stem.input)
    )
    return tokens.shape[1] - (height // p) * (width // q)
