import io

import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm

CAPTIONS = ["a red square", "a dog on a beach", "une forêt", "собака на пляже"]


@pytest.fixture(scope="package")
def tokenizer():
    return kcm.data.CLIPTokenizer.train(CAPTIONS, 600, context_length=8)


@pytest.fixture(scope="package")
def model(tokenizer):
    """A CLIP of 16 pixels that has learned nothing."""
    backbone = kcm.models.clip_backbone("tiny", 16, tokenizer.vocabulary_size, 8, 4)
    return kcm.ContrastiveModel.from_backbone(backbone, masking=kcm.RandomMasking(0.5))


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """Nine pictures of noise in two folders, most of them not square, and a file."""
    folder = tmp_path_factory.mktemp("my pictures")
    rng = np.random.default_rng(0)
    (folder / "2024" / "ночь").mkdir(parents=True)
    for index in range(9):
        place = folder / ("2024/ночь" if index % 2 else "2024") / f"{index}.png"
        size = (20 + 3 * index, 40 - 2 * index, 3)
        # Coarse, so that the middle of different pictures differs.
        pixels = rng.integers(0, 256, (5, 5, 3), "uint8")
        Image.fromarray(pixels).resize(size[:2]).save(place)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="package")
def index(model, folder):
    return kcm.search.ImageIndex.build(model, folder, batch_size=4, verbose=0)


@pytest.fixture
def png():
    def png(width=24, height=16, colour=(200, 30, 30)):
        file = io.BytesIO()
        Image.new("RGB", (width, height), colour).save(file, "PNG")
        return file.getvalue()

    return png


def unit_rows(count, width=8, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("float32")
