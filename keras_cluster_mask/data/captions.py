"""Reads all captions of a source, and chooses one caption per sample."""

import os
from collections.abc import Sequence

from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.pairs import PairReader


def read_captions(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    caption_key: str | Sequence[str] | None = None,
) -> list[str]:
    """Reads all captions of a source, for training a tokenizer.

    Example:

    ```python
    captions = kcm.data.read_captions("datasets/images/train-*.tar")
    tokenizer = kcm.data.CLIPTokenizer.train(captions, vocabulary_size=3000)
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        caption_key: str or sequence of str. The field that holds captions; see
            `image_text_dataset`. Defaults to `None`: common names.

    Returns:
        List of str, in the order of the samples. Broken samples are left out.
    """
    index = open_index(source, PairReader(caption_key=caption_key))
    samples = index.read(range(len(index)), with_images=False)
    return [text for each in samples for text in getattr(each, "captions", ())]


class CaptionChoice:
    """Chooses one caption per sample and puts it into a template.

    Args:
        template: str or sequence of str that contain `{}`, or None.
        training: bool. Whether to draw captions and templates at random, instead of
            taking the first.
    """

    def __init__(self, template, training):
        templates = (
            [template] if isinstance(template, str) else list(template or ["{}"])
        )
        for each in templates:
            if not isinstance(each, str) or each.count("{}") != 1:
                raise ValueError(
                    "`caption_template` must be str that hold {} exactly once, for the "
                    f"caption. Received: caption_template={template!r}"
                )
        self._templates = templates
        self._training = training

    def __call__(self, pair, generator):
        """Returns the caption of a pair, as bytes.

        Args:
            pair: `Pair`.
            generator: `np.random.Generator`. Only used in training.
        """
        caption = self._drawn(pair.captions, generator)
        return _filled(self._drawn(self._templates, generator), caption)

    def all_of(self, pair):
        """Returns all captions in the first template, as a tuple of bytes."""
        return tuple(_filled(self._templates[0], text) for text in pair.captions)

    def _drawn(self, choices, generator):
        if self._training and len(choices) > 1:
            return choices[int(generator.integers(len(choices)))]
        return choices[0]


def _filled(template, caption):
    return template.replace("{}", caption).encode("utf-8", "surrogatepass")
