"""A model, its pictures and its texts for programs that are written for open_clip.

torch is imported in functions alone, since models of JAX and TensorFlow do without.
"""

import keras
import numpy as np

from keras_cluster_mask.data.images import cut_middle
from keras_cluster_mask.evaluation.embedding import Embedder


class Adapter:
    """A `ContrastiveModel` that takes and returns torch tensors, as open_clip's do.

    It embeds by Keras's compiled inference, without gradients, and in the precision of
    the model's dtype policy: `torch.autocast` has no influence.

    Args:
        model: A `ContrastiveModel`.
    """

    def __init__(self, model):
        self._embedder = Embedder(model)

    def encode_image(self, images):
        """Embeds images.

        Args:
            images: `(batch, 3, H, W)` tensor: uint8, as `Transform` makes it, or floats
                that are normalised, as open_clip's transforms make them.

        Returns:
            `(batch, d)` float32 tensor on the same device, L2-normalised.
        """
        import torch

        if images.dtype != torch.uint8:
            images = images.float()
        if keras.config.image_data_format() == "channels_last":
            images = images.permute(0, 2, 3, 1)
        return _embedded(self._embedder.images, images)

    def encode_text(self, token_ids):
        """Embeds texts.

        Args:
            token_ids: `(batch, T)` int tensor.

        Returns:
            `(batch, d)` float32 tensor on the same device, L2-normalised.
        """
        return _embedded(self._embedder.texts, token_ids.int())

    def eval(self):
        """Returns itself: it is made for inference."""
        return self

    def to(self, device):
        """Returns itself: Keras has placed the model already.

        Args:
            device: Ignored.
        """
        return self


def _embedded(embed, inputs):
    import torch

    # On torch, Keras's own layers would be rounded.
    with torch.autocast(inputs.device.type, enabled=False):
        embeddings = embed(inputs.detach().cpu().numpy())
    return torch.tensor(embeddings, device=inputs.device)


class Transform:
    """Cuts out the middle of a picture, as open_clip's transform for evaluation does.

    The shorter side is resized (bicubic, antialiased) and the longer one cut. The
    pixels are left uint8, a quarter of the memory, since the model normalises them on
    the device, by the statistics it was trained with. Note that open_clip squashes
    pictures for its SigLIP models rather than cut them.

    Args:
        image_size: `(height, width)`.
    """

    def __init__(self, image_size):
        self.image_size = tuple(image_size)

    def __call__(self, image):
        """Cuts a picture.

        Args:
            image: `PIL.Image.Image`.

        Returns:
            `(3, H, W)` uint8 torch tensor.
        """
        import torch

        # In this order, in which open_clip treats palettes and transparency too.
        pixels = np.array(cut_middle(image, self.image_size).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class Tokenizer:
    """Turns texts into a torch tensor of ids, and checks that they fit the model.

    Args:
        tokenizer: Function from a list of str to `(texts, T)` ids.
        context_length: Integer, the T of the model; `None` if it takes any.
        vocabulary_size: Integer, the number of ids that the model knows, or `None`.
    """

    def __init__(self, tokenizer, context_length=None, vocabulary_size=None):
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.vocabulary_size = vocabulary_size

    def __call__(self, texts):
        """Turns texts into ids.

        Args:
            texts: str, or list of them.

        Returns:
            `(texts, T)` int64 torch tensor.

        Raises:
            ValueError: If the ids do not fit the model.
        """
        import torch

        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = np.asarray(keras.ops.convert_to_numpy(self.tokenizer(texts)), "int64")
        length = self.context_length or ids.shape[-1]
        if ids.shape != (len(texts), length):
            raise ValueError(
                "`tokenizer` must return ids of the length that the model's text "
                f"encoder takes, here of shape {(len(texts), length)}. "
                f"Received: ids of shape {ids.shape}"
            )
        size = self.vocabulary_size
        if size is not None and ids.size and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(
                "`tokenizer` must be the one that the model was trained with, whose "
                f"text encoder knows the ids 0 to {size - 1}. "
                f"Received: ids from {ids.min()} to {ids.max()}"
            )
        return torch.from_numpy(ids)
