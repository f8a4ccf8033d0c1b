"""Reads all captions of a source, and chooses one caption per sample."""

import contextlib

from keras_cluster_mask.data.pairs import PairReader
from keras_cluster_mask.data.sources import ShardError, find_shards


def read_captions(source, caption_key=None):
    """Reads all captions of a source, for training a tokenizer.

    Example:

    ```python
    captions = kcm.data.read_captions("datasets/images/train-*.tar")
    tokenizer = kcm.data.CLIPTokenizer.train(captions, vocabulary_size=3000)
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        caption_key: str or sequence of str. The field that holds captions; see
            `image_text_dataset`. Defaults to `None`: the usual names.

    Returns:
        List of str, in the order of the files. Samples without a caption and the rest
        of a damaged shard are left out.
    """
    reader = PairReader(find_shards(source), caption_key=caption_key)
    captions = []
    for shard in reader.shards:
        with contextlib.suppress(ShardError, OSError):
            for sample in shard.read(reader.caption_fields):
                captions.extend(reader.captions(sample)[0])
    return captions


class CaptionChoice:
    """Chooses one caption per sample and puts it into a template.

    Args:
        template: str or sequence of str that hold `{}`, or None.
        training: bool. Whether to draw captions and templates, or to take the first.
    """

    def __init__(self, template, training):
        templates = (
            [template] if isinstance(template, str) else list(template or ["{}"])
        )
        for each in templates:
            if not isinstance(each, str) or each.count("{}") != 1:
                raise ValueError(
                    "`caption_template` must be str that hold {} exactly once, for the "
                    f"caption. Received: {template!r}"
                )
        self._templates = [each.partition("{}")[::2] for each in templates]
        self._training = training

    def __call__(self, pairs, draws):
        """Chooses the captions of pairs.

        Args:
            pairs: list of `Pair`.
            draws: array `(pairs, 2)` of floats from 0 to 1.

        Returns:
            list of bytes.
        """
        return [self._one(pair, *draw) for pair, draw in zip(pairs, draws)]

    def all_of(self, pair):
        """All captions of a pair, each in the first template, as a tuple of bytes."""
        before, after = self._templates[0]
        return tuple(_encoded(f"{before}{text}{after}") for text in pair.captions)

    def _one(self, pair, caption, template):
        caption = self._drawn(pair.captions, caption)
        before, after = self._drawn(self._templates, template)
        return _encoded(f"{before}{caption}{after}")

    def _drawn(self, choices, draw):
        return choices[int(draw * len(choices)) if self._training else 0]


def _encoded(caption):
    return caption.encode("utf-8", "surrogatepass")
