"""Shared by the tests of the documentation: a reader's folder, and the quickstart."""

import io
import json
import pathlib
import tarfile

import keras
import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.pairs import PairReader

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = ROOT / "datasets" / "images" / "test-00000.tar"
# How many held-out images each shard has in place of those of the repository.
SHARDS = {
    "train-00000": 64,
    "train-00001": 16,
    "validation-00000": 32,
    "test-00000": 64,
}


@pytest.fixture(scope="session")
def folder_of_data(tmp_path_factory):
    """The data that pages name: small, in the places of large."""
    folder = tmp_path_factory.mktemp("docs")
    shards = folder / "datasets" / "images"
    shards.mkdir(parents=True)
    (folder / "datasets" / "photographs").symlink_to(ROOT / "datasets" / "photographs")
    pairs = open_index(IMAGES, PairReader()).read(range(sum(SHARDS.values())))
    for name, count in SHARDS.items():
        files = []
        for _, pair in zip(range(count), pairs):
            files.append((f"{pair.key}.webp", pair.image))
            files.append((f"{pair.key}.txt", pair.captions[0].encode()))
        write_tar(shards / f"{name}.tar", files)
    for name in ("shards", "cc12m", "own"):
        (folder / name).symlink_to(shards)

    several = [
        (f"{i}.{kind}", content)
        for i in range(8)
        for kind, content in (
            ("png", encoded(i)),
            ("json", json.dumps({"captions": [f"a {i}", f"the {i}"]}).encode()),
        )
    ]
    write_tar(shards / "coco-00000.tar", several)
    table = folder / "photos" / "table.tsv"
    table.parent.mkdir()
    lines = ["photo_file\talt_text", *(f"{i}.png\tnumber {i}" for i in range(8))]
    table.write_text("\n".join(lines))
    for i in range(8):
        (table.parent / f"{i}.png").write_bytes(encoded(i))
    for part in ("train", "test"):
        for place, name in enumerate(("daisy", "rose", "tulip")):
            of_class = folder / "flowers" / part / name
            of_class.mkdir(parents=True)
            for i in range(6):
                (of_class / f"{i}.png").write_bytes(encoded(80 * place + i))
    return folder


def encoded(red):
    file = io.BytesIO()
    Image.new("RGB", (60, 48), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def in_folder(folder_of_data, tmp_path, monkeypatch):
    """A folder of its own for what a page writes, with the data in it."""
    for path in folder_of_data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quickstart(in_folder):
    """What the quickstart has made, as the how-to pages continue it."""
    captions = kcm.data.read_captions("datasets/images/train-*.tar")
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 3000, context_length=12)

    def dataset(split, training):
        return kcm.data.image_text_dataset(
            f"datasets/images/{split}-*.tar", tokenizer, 48, 64, training
        )

    train = dataset("train", True)
    backbone = kcm.models.clip_backbone(
        "tiny", 48, tokenizer.vocabulary_size, tokenizer.context_length
    )
    recipe = kcm.small_data_recipe(9, steps_per_epoch=len(train), learning_rate=1.5e-3)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=recipe.masking)
    model.compile(recipe.optimizer)
    return {
        "__name__": "__main__",
        "keras": keras,
        "np": np,
        "kcm": kcm,
        "captions": captions,
        "tokenizer": tokenizer,
        "train": train,
        "validation": dataset("validation", False),
        "test": dataset("test", False),
        "backbone": backbone,
        "masking": recipe.masking,
        "recipe": recipe,
        "model": model,
    }
