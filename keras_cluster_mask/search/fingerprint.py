"""What tells the model that an index was built with from others."""

import dataclasses

import numpy as np

from keras_cluster_mask.search.query_pictures import as_model_input

# Two models of one width place a picture anywhere; rounding, also of 16 bits, moves it
# far less than this.
SAME = 0.99


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Where a model places one picture, always the same.

    Attributes:
        image_size: `(height, width)` of the pictures that the model was given.
        embedding: List of floats, that of the picture.
    """

    image_size: tuple
    embedding: list

    @classmethod
    def of(cls, embedder, image_size):
        """The fingerprint of a model.

        Args:
            embedder: `Embedder`.
            image_size: `(height, width)`.
        """
        row, column, channel = np.indices((*image_size, 3))
        picture = ((7 * row + 13 * column + 50 * channel) % 256).astype("uint8")
        (embedding,) = embedder.images(as_model_input(picture[None]))
        return cls(tuple(image_size), embedding.tolist())

    def check(self, embedder):
        """Raises an error if a model is not the one of this fingerprint."""
        found = Fingerprint.of(embedder, self.image_size).embedding
        width = len(self.embedding)
        if len(found) != width:
            raise ValueError(
                "`model` must be the one that the index was built with, whose "
                f"embeddings are {width} wide. Received: a model of width {len(found)}"
            )
        similarity = float(np.dot(found, self.embedding))
        if not similarity >= SAME:
            raise ValueError(
                "`model` must be the one that the index was built with; to search by "
                "another, or one that was trained further, build the index anew. "
                "Received: a model that places a test picture elsewhere (cosine "
                f"{similarity:.3f})"
            )

    def as_dict(self):
        """What JSON can hold, to be passed to the class again."""
        return {"image_size": list(self.image_size), "embedding": self.embedding}
