import functools

from keras import ops, tree

from keras_cluster_mask.models.embedding_layer import find_embedding_layer, split_at
from keras_cluster_mask.models.masked_encoder import MaskedEncoder


@functools.lru_cache(maxsize=8)
def tokens_per_image(encoder, image_shape):
    """How many tokens an encoder's blocks see of an image in training.

    Args:
        encoder: A vision transformer, masked or not.
        image_shape: tuple of ints, without the batch.

    Returns:
        Integer; `None` if the encoder's tokens are not known.
    """
    masking = None
    if isinstance(encoder, MaskedEncoder):
        masking, layer, encoder = (
            encoder.masking,
            encoder.embedding_layer,
            encoder.encoder,
        )
    else:
        try:
            layer = find_embedding_layer(encoder)
        except ValueError:
            return None
    stem, _ = split_at(encoder, layer)
    # Tried out, since the declared shape of some embedding layers is off by one.
    images = ops.zeros((1, *image_shape), tree.flatten(stem.input)[0].dtype)
    tokens = stem(tree.map_structure(lambda _: images, stem.input))
    if masking is None:
        return tokens.shape[1]
    num_patches = masking.count_patches(images, tokens)
    return tokens.shape[1] - num_patches + masking.num_kept(num_patches)
