"""Computes the embeddings of a dataset."""

import warnings
from collections.abc import Sequence

import numpy as np

from keras_cluster_mask.batches import check_not_empty, num_images, read_batches
from keras_cluster_mask.distribution.processes import progress_bar
from keras_cluster_mask.encoders.embedder import Embedder
from keras_cluster_mask.evaluation.inputs import check_read_once, encoded, texts_of
from keras_cluster_mask.losses import without_padding
from keras_cluster_mask.models.loading import AnyModel, as_contrastive_model
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.training.model_tokenizer import (
    check_data_tokenizer,
    tokenizer_of,
)
from keras_cluster_mask.types import EvaluationData, Tokenizer

# The number of texts that are ordered by length at a time.
WINDOW = 4096


def embed(
    model: AnyModel,
    data: EvaluationData,
    tokenizer: Tokenizer | None = None,
    verbose: str | int = "auto",
) -> dict[str, np.ndarray]:
    """Embeds a dataset batch by batch.

    The data may be larger than memory: only embeddings, labels, keys and captions are
    kept. Masking is off.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    batch = {
        "images": np.random.randint(0, 256, (10, 32, 32, 3)).astype("uint8"),
        "token_ids": np.random.randint(1, 100, (10, 12)),
        "labels": np.arange(10) % 2,
    }
    found = kcm.evaluation.embed(model, batch)
    found["image_embeddings"].shape  # (10, 96)
    found["labels"].shape  # (10,)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a saved one.
        data: An iterable of batches (`image_text_dataset`, a `tf.data.Dataset`, a
            `PyDataset`), each a dictionary with `"images"`, a pair `(images, labels)`,
            or only images. Or one such dictionary, pair or array with all data. Images
            are `(batch, H, W, C)`, uint8 or normalized floats. All batches must have
            the same entries. For an `image_text_dataset`, each process embeds the
            images that it reads.
        tokenizer: A callable from a list of str to ints `(batch, length)`, such as a
            `CLIPTokenizer`; or a tokenizer of open_clip or Hugging Face, which pads and
            truncates to its own length or the model's, whichever is shorter. The
            tokenizer reads the `"captions"` of the batches: one per image, or a tuple
            of several. Defaults to the tokenizer of the model. For batches without
            captions, `"token_ids"` are embedded, if present.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        A dictionary of arrays: `"image_embeddings"`, `(images, d)` float32,
        L2-normalized; with texts also `"text_embeddings"`, `(texts, d)`,
        `"image_of_text"`, `(texts,)` int64, the row of the image that each text
        belongs to, and `"text_numbers"`, `(texts,)` int64, equal for texts with equal
        token ids, padding aside; and all other entries of the batches, such as
        `"labels"`.

    Raises:
        ValueError: For data without images or with an entry that some batches lack, for
            an `image_text_dataset` with `training=True`, for an unsupported model, or
            for a tokenizer that lacks the special tokens that the model's text tower
            needs.
    """
    check_read_once(data)
    embedder = embedder_of(model)
    if tokenizer is None:
        check_data_tokenizer(embedder.model, data)
    return embed_batches(embedder, data, read_batches(data), tokenizer, verbose)


def embed_batches(embedder, data, batches, tokenizer, verbose):
    """Embeds batches that were read from data, as `embed` does.

    Args:
        embedder: An `Embedder`.
        data: The data, which may know its number of images.
        batches: Iterable of dictionaries of arrays.
        tokenizer: See `embed`.
        verbose: See `embed`.
    """
    model = embedder.model
    of_texts, family = model.text_tower.input_names, model.text_tower.family
    if tokenizer is not None:
        tokenizer = tokenizer_of(model, tokenizer)
    rows, numbers = {}, {}
    count = 0
    progress = progress_bar(num_images(data), verbose, "image")
    for batch in batches:
        size = len(batch["images"])
        if not size:
            continue
        if tokenizer is None and model.tokenizer is not None and "captions" in batch:
            tokenizer = tokenizer_of(model)
        if tokenizer is None and "token_ids" in batch:
            model.input_rules.check_texts(batch)
        found = {
            **{k: v for k, v in batch.items() if k not in ("images", *of_texts)},
            "image_embeddings": embedder.images(batch["images"]),
        }
        owners = np.arange(size)
        inputs = {k: batch[k] for k in of_texts if k in batch}
        if tokenizer is not None:
            captions, owners = texts_of(batch)
            inputs = {"token_ids": tokenizer(captions)}
        if "token_ids" in inputs:
            found["text_embeddings"] = embedder.texts(inputs)
            found["image_of_text"] = count + owners
            # Batches may be padded to different lengths, after the texts with -1.
            mask = inputs.get("padding_mask")
            read = without_padding(family, inputs["token_ids"], mask, np)
            texts = [np.trim_zeros(row, "b").tobytes() for row in read + 1]
            found["text_numbers"] = np.array(
                [numbers.setdefault(text, len(numbers)) for text in texts], "int64"
            )
        if rows and rows.keys() != found.keys():
            raise ValueError(
                "`data` must have the same entries in all batches. Received: some "
                f"batches without {sorted(rows.keys() ^ found.keys())}"
            )
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
        count += size
        progress.update(count, finalize=False)
    check_not_empty(count, data)
    progress.update(count, finalize=True)
    unused = data.unused_captions if isinstance(data, Stream) else 0
    if unused and "text_embeddings" in rows:
        warnings.warn(
            f"{unused} captions are ignored, because `data` has one caption for each "
            "image: pass `include_captions=True` to `image_text_dataset` to use all "
            "captions.",
            stacklevel=3,
        )
    return {name: np.concatenate(values) for name, values in rows.items()}


def embed_texts(
    model: AnyModel,
    texts: Sequence[str | bytes],
    tokenizer: Tokenizer | None = None,
    verbose: str | int = "auto",
) -> np.ndarray:
    """Embeds texts, with progress; see also `ContrastiveModel.encode_text`.

    Example:

    ```python
    tokenizer = kcm.data.CLIPTokenizer.train(["a red square"], 600)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    found = kcm.evaluation.embed_texts(backbone, ["red", "a square"], tokenizer)
    found.shape  # (2, 96)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a saved one.
        texts: List of str or bytes.
        tokenizer: As for `embed`. Defaults to the tokenizer of the model.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        `(texts, d)` float32 array, L2-normalized.

    Raises:
        ValueError: For no texts, for an unsupported model, or for a tokenizer that
            lacks the special tokens that the model's text tower needs.
    """
    if isinstance(texts, str | bytes) or not len(texts):
        raise ValueError(
            f"`texts` must be a list of at least one str. Received: texts={texts!r}"
        )
    embedder = embedder_of(model)
    tokenizer = tokenizer_of(embedder.model, tokenizer)
    progress = progress_bar(len(texts), verbose, "text")
    found = []
    for start in range(0, len(texts), WINDOW):
        chunk = [encoded(text) for text in texts[start : start + WINDOW]]
        found.append(embedder.texts(tokenizer(chunk), report=progress.add))
    return np.concatenate(found)


def embedder_of(model):
    """Returns the `Embedder` of a model; returns an embedder unchanged."""
    return (
        model if isinstance(model, Embedder) else Embedder(as_contrastive_model(model))
    )
