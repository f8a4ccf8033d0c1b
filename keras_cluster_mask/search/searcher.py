"""Search by words and by pictures: a model beside an index."""

import os
import typing

import numpy as np

from keras_cluster_mask.evaluation.embedding import Embedder, embed_texts
from keras_cluster_mask.models.loading import image_size_of
from keras_cluster_mask.search.image_index import ImageIndex
from keras_cluster_mask.search.query_pictures import as_model_input, cut_picture


class SearchResult(typing.NamedTuple):
    """What was searched for, and what was found.

    Attributes:
        query: The text or picture, as it was given.
        matches: List of `Match`, the most similar first.
        is_image: bool. Whether the query is a picture, or the path of one.
    """

    query: typing.Any
    matches: list
    is_image: bool = False


class Searcher:
    """Finds the pictures of an index by words or by other pictures.

    The model is compiled at the first search of a kind, so keep a searcher for more
    than one.

    Example:

    ```python
    import pathlib
    from PIL import Image

    pathlib.Path("pictures").mkdir(exist_ok=True)
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (64, 48), colour).save(f"pictures/{colour}.png")

    tokenizer = kcm.data.CLIPTokenizer.train(["a red picture", "a blue picture"], 600)
    model = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    index = kcm.search.ImageIndex.build(model, "pictures")

    searcher = kcm.search.Searcher(model, index, tokenizer)
    for match in searcher.by_text("a red picture", k=2).matches:
        print(f"{match.similarity:.2f} {match.key}")
    results = searcher.by_image(["pictures/red.png", "pictures/blue.png"], k=2)
    kcm.search.result_sheet(results).save("results.png")
    ```

    Args:
        model: The model that the index was built with: a `ContrastiveModel`, a
            keras_hub `CLIPBackbone` or `SigLIPBackbone`, or the path of one that was
            saved.
        index: An `ImageIndex`, or the path of one that was saved.
        tokenizer: A callable from a list of bytes to ints `(batch, length)`, such as a
            `CLIPTokenizer`, for searches by words.

    Raises:
        ValueError: If the index was built with another model.
    """

    def __init__(self, model, index, tokenizer=None):
        if isinstance(index, str | os.PathLike):
            index = ImageIndex.load(index)
        self.index = index
        self.tokenizer = tokenizer
        self._embedder = Embedder.of(model)
        if index.fingerprint is not None:
            index.fingerprint.check(self._embedder)

    def by_text(self, texts, k=10, approximate=False):
        """Finds the pictures that words describe.

        Args:
            texts: str, or list of str.
            k: Integer. How many pictures to find for each.
            approximate: Boolean. See `ImageIndex.search`.

        Returns:
            A `SearchResult` for a single text, a list of them for a list.

        Raises:
            ValueError: Without a tokenizer, or for a text that is empty.
        """
        single = isinstance(texts, str)
        texts = [texts] if single else list(texts)
        if self.tokenizer is None:
            raise ValueError(
                "`tokenizer` must be given to a `Searcher` that is to search by words. "
                "Received: tokenizer=None"
            )
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(
                "`texts` must be a str, or a list of at least one, none of them empty. "
                f"Received: texts={texts}"
            )
        embeddings = embed_texts(self._embedder, texts, self.tokenizer, verbose=0)
        found = self.index.search(embeddings, k, approximate)
        results = [SearchResult(*each) for each in zip(texts, found)]
        return results[0] if single else results

    def by_image(self, images, k=10, approximate=False):
        """Finds the pictures that look like others, which need not be in the index.

        Args:
            images: The path of a picture, a `PIL.Image.Image`, a `(H, W, C)` uint8
                array of any size, or a list of these. Each is cut to its middle, as
                those of the index were.
            k: Integer. How many pictures to find for each.
            approximate: Boolean. See `ImageIndex.search`.

        Returns:
            A `SearchResult` for a single picture, a list of them for a list.

        Raises:
            FileNotFoundError: If there is no picture at a path.
            ValueError: For a picture that cannot be read.
        """
        single = not isinstance(images, list | tuple)
        images = [images] if single else list(images)
        if not images:
            raise ValueError(
                "`images` must be a picture, or a list of at least one. "
                f"Received: images={images}"
            )
        mark = self.index.fingerprint
        size = mark.image_size if mark else image_size_of(self._embedder.model)
        cut = np.stack([cut_picture(image, size) for image in images])
        embeddings = self._embedder.images(as_model_input(cut))
        found = self.index.search(embeddings, k, approximate)
        results = [SearchResult(*each, is_image=True) for each in zip(images, found)]
        return results[0] if single else results
