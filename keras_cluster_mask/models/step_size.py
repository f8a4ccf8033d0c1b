import dataclasses

from keras_cluster_mask import distribution


@dataclasses.dataclass(frozen=True)
class StepSize:
    """What is trained on in a step, as far as it can be told before.

    Attributes:
        batch_size: Integer, the pairs of a step on all devices together.
        pairs: Integer, the pairs of an epoch, if the last batch may not be full.
        image_shape: tuple of the shape of an image, with `None` for what is not known.
        text_length: Integer or `None`, the tokens of a text.
    """

    batch_size: int
    pairs: int | None
    image_shape: tuple
    text_length: int | None

    def samples(self, steps):
        """How many pairs so many steps of an epoch take."""
        samples = steps * self.batch_size
        return samples if self.pairs is None else min(samples, self.pairs)

    @classmethod
    def of(cls, data, batch_size):
        """The step size of what is passed to `fit`, or `None` if it is not known.

        Args:
            data: A dictionary of arrays, a `tf.data.Dataset`, or anything else.
            batch_size: Integer, of arrays.
        """
        rows = rows_of(data)
        pairs = None
        if isinstance(data, dict):
            images, ids = data["images"], data["token_ids"]
            pairs = len(images)
            rows = min(batch_size, pairs)
        elif rows is not None:
            images, ids = (data.element_spec[key] for key in ("images", "token_ids"))
        else:
            return None
        processes = distribution.process(training=True)[1]
        return cls(
            batch_size=rows * processes,
            pairs=None if pairs is None else pairs * processes,
            image_shape=tuple(images.shape[1:]),
            text_length=ids.shape[1],
        )


def rows_of(data):
    """The rows of a batch of a `tf.data.Dataset`, or `None` if that is not known."""
    spec = getattr(data, "element_spec", None)
    return spec["token_ids"].shape[0] if isinstance(spec, dict) else None
