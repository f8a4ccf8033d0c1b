"""Features of frozen towers, computed once, from which the projections are trained."""

import json
import math
import os
import pathlib
import zlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.training.arrays import ArrayBatches
from keras_cluster_mask.training.layers import all_layers, differences, settings_of

# The file with the description, the numbers of rows and whether they are all there.
HEADER = "features.json"
# The arrays of a folder, one `.npy` file each, and what they have a row for.
ROWS_OF = {
    "image_features": "images",
    "num_captions": "images",
    "text_features": "texts",
    # Equal captions have equal labels, whatever they were padded with.
    "caption_labels": "texts",
}
# Rows that are read at a time.
ROWS = 65_536


class TowerFeatures:
    """Features of both towers for a dataset, in memory-mapped `.npy` files.

    `kcm.compute_features` returns them, and `ContrastiveModel.fit` trains the
    projections on them. Each epoch draws one caption of each image.

    Example:

    ```python
    tokenizer = kcm.data.CLIPTokenizer.train(["a dog", "a cat"], 600)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    model = kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)
    images = np.random.randint(0, 256, (8, 32, 32, 3)).astype("uint8")
    data = {"images": images, "captions": [("a dog", "a cat")] * 8}
    kcm.compute_features(model, data, "features")
    # In a later program:
    features = kcm.TowerFeatures("features")
    features.num_images, features.num_texts  # (8, 16)
    ```

    Args:
        folder: str or path. A folder that `compute_features` has filled.

    Attributes:
        description: Dictionary. What the features depend on: the encoders and their
            compute dtypes, the pixel mean and deviation of the model, the tokenizer,
            and the data, without the dates of files.
        tokenizer_digest: String, or `None`. Identifies the tokenizer.
        num_images: Integer. The number of images.
        num_texts: Integer. The number of captions of all images.
        counts: `(num_images,)` array. The number of captions of each image.
        first_text: `(num_images,)` array. The row of the first caption of each image.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = local_folder(folder)
        found = read_header(self.folder)
        if not found.get("done"):
            raise ValueError(
                "`folder` must contain the features of a whole dataset: call "
                f"`compute_features` again, which resumes. Received: folder={folder}"
            )
        self.description = found["description"]
        # A run on the features resumes if they are recomputed from copied files.
        del self.description["files"]
        self.tokenizer_digest = self.description["tokenizer"]
        self.num_images, self.num_texts = found["images"], found["texts"]
        self._arrays = {
            name: np.load(self.folder / f"{name}.npy", mmap_mode="r")
            for name in ROWS_OF
        }
        self.counts = self._arrays.pop("num_captions")
        self.first_text = np.cumsum(self.counts) - self.counts

    def check_model(self, model: keras.Model, training: bool = False) -> None:
        """Raises an error unless a model computes the same features.

        Args:
            model: A `ContrastiveModel`.
            training: Boolean. Whether they must stay so while the model is trained.
        """
        expected = {**self.description, "towers": describe_towers(model)}
        check_same(self.description, expected, "towers")
        if not training:
            return
        for name in ("image_encoder", "text_encoder"):
            trained = getattr(model, name).trainable_weights
            if trained:
                raise ValueError(
                    f"`{name}` must be frozen to train on features, which do not "
                    f"change: set `model.{name}.trainable = False` before compiling. "
                    f"Received: {len(trained)} trainable weights"
                )

    def statistics(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean and the deviation of each feature, reading rows in parts.

        Args:
            name: `"image"` or `"text"`.
        """
        rows = self._arrays[f"{name}_features"]
        parts = np.array_split(rows, math.ceil(len(rows) / ROWS))
        mean = sum(part.sum(axis=0, dtype="float64") for part in parts) / len(rows)
        square = sum(((part - mean) ** 2).sum(axis=0) for part in parts) / len(rows)
        deviation = np.sqrt(square)
        # A feature that varies only by rounding is only centered.
        return mean, np.where(deviation > 1e-4 * deviation.mean(), deviation, 1.0)

    def pairs(self, images: Any, captions: Any = 0) -> dict[str, np.ndarray]:
        """Returns the features of images, and of one caption of each.

        Args:
            images: `(batch,)` ints.
            captions: `(batch,)` ints, the number of the caption of each image.
        """
        texts = self.first_text[images] + captions
        return {
            "image_features": self._arrays["image_features"][images],
            "text_features": self._arrays["text_features"][texts],
            "caption_labels": self._arrays["caption_labels"][texts],
        }


class FeatureBatches(ArrayBatches):
    """Batches of `TowerFeatures`, with one caption of each image.

    Args:
        features: `TowerFeatures`.
        batch_size: Integer.
        shuffle: Boolean.
    """

    def __init__(self, features, batch_size, shuffle=True):
        # The features stay in their files: only their widths are read.
        labels = features._arrays["caption_labels"][features.first_text]
        arrays = {**features._arrays, "caption_labels": labels}
        super().__init__(arrays, batch_size, shuffle)
        self._features = features
        self.description = {**self.description, **features.description}

    def draw(self, epoch):
        (rows,) = super().draw(epoch)
        counts = self._features.counts
        rng = np.random.default_rng([self.shuffle_seed, epoch, 1])
        captions = rng.random(len(counts)) * counts
        return np.stack([rows, captions.astype("int64")[rows]])

    def batch(self, rows, captions):
        return self._features.pairs(rows, captions)


def local_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a folder, which must not be a URL."""
    if "://" in os.fspath(folder):
        raise ValueError(f"`folder` must be a local folder. Received: folder={folder}")
    return pathlib.Path(folder).expanduser()


def read_header(folder: pathlib.Path) -> dict[str, Any]:
    """Reads how far a folder is filled, and with what; `{}` for a new folder."""
    path = folder / HEADER
    return json.loads(path.read_text()) if path.exists() else {}


def append_rows(
    folder: pathlib.Path, header: dict[str, Any], arrays: dict[str, np.ndarray]
) -> None:
    """Appends rows to the files of a folder, after the rows that its header counts.

    Args:
        folder: Path.
        header: Dictionary, of which the numbers of rows are updated.
        arrays: Dictionary of the arrays of `ROWS_OF`.
    """
    counts = {name: header[ROWS_OF[name]] for name in arrays}
    for name, rows in arrays.items():
        shape = counts[name] + len(rows), *rows.shape[1:]
        layout = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
        with open(folder / f"{name}.npy", "r+b" if counts[name] else "wb") as file:
            # NumPy leaves room for any number of rows, so its length stays the same.
            np.lib.format.write_array_header_1_0(file, layout)
            file.seek(counts[name] * rows[:1].nbytes, os.SEEK_CUR)
            file.write(np.ascontiguousarray(rows))
        header[ROWS_OF[name]] = shape[0]


def describe_towers(model: keras.Model) -> dict[str, Any]:
    """Describes what the features of a model depend on.

    Args:
        model: A `ContrastiveModel`.
    """

    def checksum(encoder):
        value = zlib.crc32(json.dumps(settings_of(encoder)).encode())
        for weight in map(ops.convert_to_numpy, encoder.weights):
            value = zlib.crc32(np.ascontiguousarray(weight), value)
        return value

    # A masking has weights, but does not change features.
    towers = [model.image_tower.unmasked_encoder, model.text_tower.encoder]
    return {
        "dtype": [sorted({x.compute_dtype for x in all_layers(y)}) for y in towers],
        "image_encoder": checksum(towers[0]),
        "text_encoder": checksum(towers[1]),
        "pixel_mean": model.pixel_mean,
        "pixel_std": model.pixel_std,
    }


def check_same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Raises an error if features come from other towers or data than given."""
    differing = [*differences(found, expected)]
    if differing:
        raise ValueError(
            f"`features` must come from the same {what}: compute the features again in "
            "another folder, or delete this folder first. Received: features that "
            "differ in " + "; ".join(differing)
        )
