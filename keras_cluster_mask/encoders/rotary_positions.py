"""Rotary positions of DINOv3, for images that keep different patches."""

import keras
from keras import ops, tree


def rotary_tables(encoder) -> list:
    """Returns an encoder's tables of rotary positions, symbolic `(N, width)` tensors.

    The encoder must be functional. DINOv3 computes the tables from the size of the
    images; other encoders have none.
    """
    layers = {type(layer).__name__: layer for layer in encoder.layers}
    if "DINOV3RopePositionEmbedding" not in layers:
        return []
    blocks = layers["DINOV3Encoder"]
    if blocks.attention_dropout or blocks.drop_path_rate:
        raise ValueError(
            "`encoder` must be a DINOv3 without dropout, because dropout would be the "
            "same for all images of a batch. Received: "
            f"attention_dropout={blocks.attention_dropout}, "
            f"drop_path_rate={blocks.drop_path_rate}"
        )
    return [*layers["DINOV3RopePositionEmbedding"].output]


def own_positions(layer):
    """Wraps a layer with a table of positions, so that it takes positions per image."""
    return RotaryByImage(layer) if type(layer).__name__ == "DINOV3Encoder" else layer


class RotaryByImage(keras.layers.Layer):
    """Runs DINOv3's blocks with separate rotary positions for each image.

    DINOv3's attention takes one table for the whole batch. Here each image is a batch
    of one, and Keras vectorizes over the images.

    Args:
        encoder: A keras_hub `DINOV3Encoder`, which shares its weights.

    Call arguments:
        tokens: `(batch, prefix + K, dim)` tensor.
        position_embeddings: Two `(batch, K, width)` tensors, cosines and sines.
        num_prefix_tokens: Integer.
        tokens_mask: `(batch, prefix + K)` booleans, false for hidden tokens, or `None`.
    """

    def __init__(self, encoder):
        super().__init__(name=f"{encoder.name}_by_image")
        # The blocks cast their own inputs.
        self.autocast = False
        self.encoder = encoder
        self.supports_masking = True
        self.built = True

    def call(
        self,
        tokens,
        position_embeddings,
        num_prefix_tokens=0,
        tokens_mask=None,
        training=None,
    ):
        def one_image(given):
            tokens, cosines, sines, *mask = given
            outputs = self.encoder(
                tokens[None],
                attention_mask=mask[0][None, None, None] if mask else None,
                position_embeddings=(cosines, sines),
                num_prefix_tokens=num_prefix_tokens,
                training=training,
            )
            return tree.map_structure(lambda x: x[0], outputs)

        given = [tokens, *position_embeddings]
        if tokens_mask is not None:
            given.append(tokens_mask)
        return ops.vectorized_map(one_image, given)

    def compute_mask(self, inputs, previous_mask=None):
        # Keras would give it only to the first output.
        return [previous_mask] * (1 + self.encoder.num_layers)

    def compute_output_spec(self, tokens, *args, **kwargs):
        # Make a new tensor for each output, because Keras identifies tensors by `id`.
        def output():
            return keras.KerasTensor(tokens.shape, dtype=tokens.dtype)

        stages = range(1, 1 + self.encoder.num_layers)
        return output(), {f"stage{index}": output() for index in stages}
