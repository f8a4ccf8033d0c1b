"""Retrieval: recall in both directions."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.checks import check_choice
from keras_cluster_mask.evaluation.embedding import embed_batches, embedder_of
from keras_cluster_mask.evaluation.inputs import (
    check_ks,
    check_labels,
    check_matrix,
    pairs_of,
    select_entries,
    texts_of,
)
from keras_cluster_mask.models.loading import AnyModel
from keras_cluster_mask.training.model_tokenizer import check_data_tokenizer
from keras_cluster_mask.types import EvaluationData, Tokenizer

# The number of similarities that are in memory at a time.
MAX_PAIRS = 2**23
# Similarities of unit vectors count as equal within this distance: in float32 their
# last digits depend on the order of a sum.
TIE = 2.0**-22
NEVER = np.iinfo("int64").max


def retrieval_recall(
    image_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    image_of_text: Sequence[int] | np.ndarray | None = None,
    ks: int | Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Computes the recall of image-to-text and text-to-image retrieval.

    Recall@k is the fraction of queries with a match among the k most similar items. A
    wrong item that is as similar as the best match, up to float32 rounding, ranks ahead
    of it. So a model that embeds everything alike scores 0.

    Example:

    ```python
    images = np.eye(12, 16, dtype="float32")
    texts = np.roll(images, 1, axis=0)
    image_of_text = np.roll(np.arange(12), 1)
    kcm.evaluation.retrieval_recall(images, texts, image_of_text)
    # {"image_to_text_recall@1": 1.0, ...}
    ```

    Args:
        image_embeddings: `(images, d)` array. Rows are L2-normalized in float32.
        text_embeddings: `(texts, d)` array. Rows are L2-normalized in float32.
        image_of_text: `(texts,)` ints, the row of the image that each text matches, as
            `kcm.evaluation.embed` returns it. By default, row i of the images matches
            row i of the texts.
        ks: Integer or integers, the numbers of retrieved items.

    Returns:
        A dictionary of floats in `[0, 1]` with the keys
        `image_to_text_recall@k` and `text_to_image_recall@k` for each k.

    Raises:
        ValueError: For embeddings of different widths, for NaN embeddings, and for
            texts without an image. An image without a text counts as a miss.
    """
    ks = check_ks(ks)
    images, texts = _normalized(image_embeddings, text_embeddings)
    if image_of_text is None:
        if len(images) != len(texts):
            raise ValueError(
                "`image_of_text` must be given unless there is one text for each "
                f"image. Received: {len(images)} images, {len(texts)} texts"
            )
        image_of_text = np.arange(len(texts))
    owners = check_labels("image_of_text", image_of_text, len(texts), len(images))
    return _recall(images, texts, np.arange(len(images))[:, None], owners, ks)


def _recall(images, texts, image_labels, text_labels, ks):
    text_labels = text_labels[:, None]
    ranks = {
        "image_to_text": _ranks(images, texts, image_labels, text_labels),
        "text_to_image": _ranks(texts, images, text_labels, image_labels),
    }
    return {
        f"{name}_recall@{k}": float(np.mean(found < k))
        for name, found in ranks.items()
        for k in ks
    }


def evaluate_retrieval(
    model: AnyModel,
    data: EvaluationData,
    tokenizer: Tokenizer | None = None,
    ks: int | Sequence[int] = (1, 5, 10),
    duplicates: str = "positive",
    verbose: str | int = "auto",
) -> dict[str, Any]:
    """Computes the retrieval recall of a model on a dataset.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    batch = {
        "images": np.random.randint(0, 256, (12, 32, 32, 3)).astype("uint8"),
        "token_ids": np.random.randint(1, 100, (12, 16)),
    }
    kcm.evaluation.evaluate_retrieval(backbone, batch)
    # {"image_to_text_recall@1": 0.08, ...}
    ```

    A model with a tokenizer can evaluate a source, which may have several captions per
    image:

    ```
    kcm.evaluation.evaluate_retrieval(model, "flickr30k-test.tar")
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a saved one.
        data: A source of images and captions, such as a path; see `image_text_dataset`.
            Or data as for `embed`. Batches hold `"images"`, and `"captions"` or, if
            there is no tokenizer, `"token_ids"`. A text matches the image in its row.
        tokenizer: See `embed`. Defaults to the tokenizer of the model.
        ks: See `retrieval_recall`.
        duplicates: `"positive"`: a text also matches the images of equal texts, which
            have the same token ids, as in `ContrastiveModel`. Or `"negative"`: such
            images are wrong, as in CLIP_benchmark.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        The dictionary of `retrieval_recall`, and `"chance"`, a dictionary with the same
        keys and the recall of a random order; see `chance_recall`.

    Raises:
        ValueError: For data without texts, and for an `image_text_dataset` with
            `training=True` or for one of several processes.
    """
    check_choice("duplicates", duplicates, ("positive", "negative"))
    ks = check_ks(ks)
    embedder = embedder_of(model)
    data = pairs_of(embedder.model, data)
    keys = []
    if tokenizer is not None or embedder.model.tokenizer is not None:
        keys = ["captions"]
    if tokenizer is None:
        keys += ["token_ids", *embedder.model.text_tower.input_names]
        check_data_tokenizer(embedder.model, data)
    batches = select_entries(data, keys)
    found = embed_batches(embedder, data, batches, tokenizer, verbose)
    images, texts = _normalized(found["image_embeddings"], found["text_embeddings"])
    owners, numbers = found["image_of_text"], found["text_numbers"]
    if duplicates == "negative":
        labels, numbers = np.arange(len(images))[:, None], owners
    else:
        # The labels of an image are the numbers of all of its texts, padded with -1.
        places = np.arange(len(owners)) - np.searchsorted(owners, owners)
        labels = np.full((len(images), places.max() + 1), -1)
        labels[owners, places] = numbers
    chance = _chance(owners, numbers, len(images), ks)
    return {**_recall(images, texts, labels, numbers, ks), "chance": chance}


def chance_recall(
    captions: Sequence[str | Sequence[str]],
    ks: int | Sequence[int] = (1, 5, 10),
    duplicates: str = "positive",
) -> dict[str, float]:
    """Computes the expected recall if items are retrieved in random order.

    If c of n items match a query, one of them is among k random items with the
    probability `1 - C(n - c, k) / C(n, k)`, which is `k / n` for one match. An image
    with several captions, and equal captions, have several matches. Equal captions are
    separate items.

    Example:

    ```python
    kcm.evaluation.chance_recall(["a cat", "a dog", "a dog", "a fox"], ks=1)
    # {"image_to_text_recall@1": 0.38, "text_to_image_recall@1": 0.38}
    ```

    Args:
        captions: List of the captions of each image, a str or a list of str.
        ks: As in `retrieval_recall`.
        duplicates: As in `evaluate_retrieval`, which compares token ids.

    Returns:
        A dictionary with the keys of `retrieval_recall`.
    """
    check_choice("duplicates", duplicates, ("positive", "negative"))
    if isinstance(captions, str | bytes) or not len(captions):
        raise ValueError(
            "`captions` must be a list of the captions of at least one image. "
            f"Received: captions={captions!r}"
        )
    texts, owners = texts_of({"captions": captions})
    if not texts:
        raise ValueError(
            f"`captions` must contain at least one text. Received: captions={captions}"
        )
    labels = owners if duplicates == "negative" else texts
    return _chance(owners, labels, len(captions), check_ks(ks))


def _chance(owners, labels, num_images, ks):
    """Returns the recall of a random order.

    Args:
        owners: `(texts,)` ints, the row of the image of each text.
        labels: `(texts,)` values. A text matches the images of texts with its label.
        num_images: Integer.
        ks: Tuple of integers.
    """
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    images, groups = np.unique([owners, labels], axis=1)
    matches = {
        "image_to_text": (np.bincount(images, sizes[groups], num_images), len(labels)),
        "text_to_image": (np.bincount(groups)[labels], num_images),
    }
    return {
        f"{name}_recall@{k}": float(np.mean(1 - _all_missed(right, count, k)))
        for name, (right, count) in matches.items()
        for k in ks
    }


def _all_missed(right, count, k):
    """Returns `C(count - right, k) / C(count, k)`: k random items do not match."""
    left = range(count, max(count - k, 0), -1)
    return math.prod(np.maximum(1 - right / n, 0) for n in left)


def _normalized(image_embeddings, text_embeddings):
    """Returns both with rows L2-normalized in float32; rows of zeros stay zero."""
    images = check_matrix("image_embeddings", image_embeddings)
    texts = check_matrix("text_embeddings", text_embeddings)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            "`image_embeddings` and `text_embeddings` must have the same width. "
            f"Received: shapes {images.shape} and {texts.shape}"
        )
    for array in (images, texts):
        # In float64, squares of very large or small values are finite and not 0.
        lengths = np.sqrt(np.einsum("id,id->i", array, array, dtype="float64"))
        lengths = np.where(lengths, lengths, 1)[:, None]
        yield np.divide(array, lengths, out=np.empty_like(array), casting="same_kind")


def _ranks(queries, items, query_labels, item_labels):
    """Counts the wrong items ahead of the best match of each query.

    Args:
        queries: `(queries, d)` float32 array of L2-normalized rows.
        items: `(items, d)` float32 array of L2-normalized rows.
        query_labels: `(queries, m)` array. A query and an item match if they have a
            label in common.
        item_labels: `(items, n)` array.

    Returns:
        `(queries,)` int64 array.
    """
    ranks, rows = [], max(1, MAX_PAIRS // len(items))
    for part in (slice(i, i + rows) for i in range(0, len(queries), rows)):
        similarity = queries[part] @ items.T
        is_match = np.zeros(similarity.shape, bool)
        for mine, theirs in itertools.product(query_labels[part].T, item_labels.T):
            is_match |= mine[:, None] == theirs
        best = np.max(similarity, axis=1, where=is_match, initial=-np.inf)
        ahead = ~is_match & (similarity >= best[:, None] - TIE)
        ranks.append(np.where(best > -np.inf, ahead.sum(axis=1), NEVER))
    return np.concatenate(ranks)
