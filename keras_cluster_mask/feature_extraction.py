"""Computes the features of frozen towers once, to train the projections on."""

import itertools
import json
import os
import zlib
from collections.abc import Iterator

import numpy as np

from keras_cluster_mask.batches import (
    as_array,
    check_not_empty,
    num_images,
    read_batches,
)
from keras_cluster_mask.data.files import replacing
from keras_cluster_mask.distribution.processes import progress_bar
from keras_cluster_mask.encoders.embedder import Embedder
from keras_cluster_mask.evaluation.inputs import check_whole, pairs_of, texts_of
from keras_cluster_mask.losses import caption_labels, without_padding
from keras_cluster_mask.models.contrastive_model import ContrastiveModel
from keras_cluster_mask.models.loading import as_contrastive_model
from keras_cluster_mask.stream import COMPARED, Stream
from keras_cluster_mask.training.features import (
    HEADER,
    TowerFeatures,
    append_rows,
    check_same,
    describe_towers,
    local_folder,
    read_header,
)
from keras_cluster_mask.training.model_tokenizer import identity_of, tokenizer_of
from keras_cluster_mask.types import EvaluationData, Items, Tokenizer

__all__ = ["compute_features"]


def compute_features(
    model: ContrastiveModel,
    data: EvaluationData,
    folder: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    verbose: str | int = "auto",
) -> TowerFeatures:
    """Runs both towers of a model once over a dataset, and stores their features.

    Training only the projections of a model on features takes seconds per epoch. An
    interrupted run resumes. A complete folder is returned without computation.

    Example:

    ```python
    tokenizer = kcm.data.CLIPTokenizer.train(["a dog", "a cat"], 600)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    model = kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)
    images = np.random.randint(0, 256, (8, 32, 32, 3)).astype("uint8")
    data = {"images": images, "captions": [("a dog", "a cat")] * 8}
    features = kcm.compute_features(model, data, "features")
    model.image_encoder.trainable = model.text_encoder.trainable = False
    model.compile("adam")
    model.fit(features, batch_size=4)
    ```

    Args:
        model: A `ContrastiveModel`.
        data: A source of images and captions, such as a path; see `image_text_dataset`.
            Or data as for `kcm.evaluation.embed`, with `"captions"`: one or several for
            each image. An `image_text_dataset` needs `include_captions=True`.
        folder: str or path. The folder to write to.
        tokenizer: As for `kcm.evaluation.embed`. Defaults to the tokenizer of the
            model. A model without a tokenizer gets this one.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        `TowerFeatures`, data for `ContrastiveModel.fit`.

    Raises:
        ValueError: If the folder holds features of other towers, of another tokenizer
            or of other data: other settings or samples, or files of other sizes or
            dates (ETags at URLs). Arrays are compared as a whole, and at least 32 items
            of an object, or batches of a list or `PyDataset`. Changes are not noticed
            in the other items, in a file that keeps its size and date, in images at
            URLs in a table or folder, in an iterator, or in other iterables
            after the first batch.
    """
    model = as_contrastive_model(model)
    data = pairs_of(model, data)
    check_whole(data)
    embedder = Embedder(model, features=True)
    tokenize = tokenizer_of(model, tokenizer)
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if model.tokenizer is None:
        # It is saved with the model, which will be trained on the features.
        model.tokenizer = tokenizer
    description = {
        "towers": describe_towers(model),
        "data": _describe_data(data),
        "tokenizer": identity_of(tokenizer),
        "files": data.versions if isinstance(data, Stream) else None,
    }
    folder = local_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = read_header(folder) or {
        "description": description,
        "batches": 0,
        "images": 0,
        "texts": 0,
        "done": False,
    }
    check_same(header["description"], description, "towers, tokenizer and data")
    if header["done"]:
        return TowerFeatures(folder)
    progress = progress_bar(num_images(data), verbose, "image")
    for batch in itertools.islice(read_batches(data), header["batches"], None):
        header["batches"] += 1
        if not len(batch["images"]):
            continue
        texts, owners = texts_of(batch)
        counts = np.bincount(owners, minlength=len(batch["images"]))
        if not counts.all():
            raise ValueError(
                "`data` must have a caption for each image. Received: "
                f"{int(np.sum(counts == 0))} images of a batch without a caption"
            )
        token_ids = tokenize(texts)
        read = without_padding(model.text_tower.family, token_ids)
        arrays = {
            "image_features": embedder.images(batch["images"]).astype("float32"),
            "num_captions": counts,
            "text_features": embedder.texts(token_ids).astype("float32"),
            "caption_labels": as_array(caption_labels(read)),
        }
        append_rows(folder, header, arrays)
        # After the rows, so that a run that was killed between writes them again.
        _write_header(folder, header)
        progress.update(header["images"], finalize=False)
    check_not_empty(header["images"], data)
    _write_header(folder, {**header, "done": True})
    progress.update(header["images"], finalize=True)
    return TowerFeatures(folder)


def _describe_data(data):
    """Describes arrays, a dataset, or other data by some batches or its first one."""
    if isinstance(data, Stream):
        return data.description
    if isinstance(data, Iterator):
        return None
    if isinstance(data, dict):
        batches = [data]
    elif isinstance(data, Items):
        numbers = range(0, len(data), max(len(data) // COMPARED, 1))
        batches = read_batches(map(data.__getitem__, numbers))
    else:
        batches = itertools.islice(read_batches(data), 1)
    checksum = 0
    for batch in batches:
        checksum = zlib.crc32(np.ascontiguousarray(batch.get("images", 0)), checksum)
        checksum = zlib.crc32(repr([*batch.get("captions", ())]).encode(), checksum)
    return checksum


def _write_header(folder, header):
    with replacing(folder / HEADER) as file:
        file.write(json.dumps(header).encode())
