"""Embeds arrays with the towers of a model, outside of training."""

import keras
import numpy as np

from keras_cluster_mask.distribution.backends import needs_xla
from keras_cluster_mask.distribution.replicas import OwnReduction

# The maximum number of rows passed to a model at a time.
MAX_SIZE = 1024
# The number of texts of similar lengths that are passed at a time.
TEXTS = 64


class Embedder:
    """Embeds arrays of images and texts, compiled for a few batch sizes.

    It reads the model's current weights in each call, so one embedder serves a whole
    training run.

    Args:
        model: A `ContrastiveModel`.
        features: Boolean. Whether to return the features that the towers project, in
            place of embeddings.
    """

    def __init__(self, model, features=False):
        self.model = model
        self._images = _Encoder(model.image_tower, features, "images")
        self._texts = _Encoder(model.text_tower, features, "texts")

    def images(self, images):
        """Embeds images into a `(batch, d)` array."""
        images = np.asarray(images)
        self.model.input_rules.check_images(images)
        return self._embedded(self._images, images)

    def texts(self, token_ids, report=None):
        """Embeds token ids, or a dictionary of a text encoder's inputs.

        Texts of similar lengths are embedded together, each group without the padding
        after its longest text.

        Args:
            token_ids: `(batch, T)` array, as `ContrastiveModel.encode_text` takes it.
            report: Function that is called with the number of texts of each group.

        Returns:
            `(batch, d)` array.
        """
        given = token_ids if isinstance(token_ids, dict) else {"token_ids": token_ids}
        arrays = {name: np.asarray(values) for name, values in given.items()}
        self.model.input_rules.check_ids(
            arrays["token_ids"], has_mask="padding_mask" in arrays
        )
        lengths = self.model.text_tower.lengths
        # From the longest one on, so that a smaller last group has short texts.
        order = np.argsort(-lengths.of(arrays), kind="stable")
        found = []
        for start in range(0, max(len(order), 1), TEXTS):
            rows = order[start : start + TEXTS]
            group = lengths.cut({name: x[rows] for name, x in arrays.items()})
            found.append(self._embedded(self._texts, group))
            if report is not None:
                report(len(rows))
        # The rows of the groups, in the order of the texts.
        return np.concatenate(found)[np.argsort(order)]

    def _embedded(self, encoder, inputs):
        arrays = [np.asarray(x) for x in keras.tree.flatten(inputs)]
        count = len(arrays[0])
        found = []
        for start in range(0, max(count, 1), MAX_SIZE):
            rows = min(count - start, MAX_SIZE)
            extra = encoder.size_for(rows) - rows
            chunk = [
                np.pad(x[start : start + rows], [(0, extra)] + [(0, 0)] * (x.ndim - 1))
                for x in arrays
            ]
            chunk = keras.tree.pack_sequence_as(inputs, chunk)
            found.append(encoder.predict_on_batch(chunk)[:rows])
        return np.concatenate(found)


class _Encoder(OwnReduction, keras.Model):
    """Embeds with a tower, or computes its features, compiled by Keras."""

    def __init__(self, tower, features, name):
        # Keras's default name would start with an underscore, which TensorFlow refuses.
        super().__init__(name=name)
        self.autocast = False
        self.tower = tower
        self.function = tower.features if features else tower.call
        self.sizes = []
        self.built = True
        if needs_xla(getattr(tower, "data_format", None)):
            self.jit_compile = True

    def call(self, inputs):
        return self.function(inputs)

    def size_for(self, count):
        """Returns the batch size to which this number of rows is padded."""
        # Each size is compiled, so an existing one is reused down to a quarter of it.
        fitting = [size for size in self.sizes if count <= size <= 4 * max(count, 1)]
        if not fitting:
            fitting = [count if count > 8 else 1 << max(count - 1, 0).bit_length()]
            self.sizes = [*self.sizes, *fitting]
        return min(fitting)
