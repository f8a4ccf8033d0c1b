"""Shared by the tests of the search: photographs, a model, and its exported folder."""

import sys
import tarfile

import pytest

import keras_cluster_mask as kcm
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture
def photos(copy_pairs, tmp_path):
    """A folder of 64 images, one of which is in a folder inside."""
    folder = tmp_path / "photos"
    with tarfile.open(copy_pairs("test-00000", tmp_path / "images.tar", 64)) as found:
        for member in found.getmembers():
            if not member.name.endswith(("txt", "json")):
                found.extract(member, folder, filter="data")
    (folder / "inside").mkdir()
    first = min(folder.glob("*.*"))
    first.rename(folder / "inside" / first.name)
    return folder


@pytest.fixture
def model():
    tokenizer = kcm.data.CLIPTokenizer.train(["a red boat", "a blue car"] * 9, 600, 12)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size, 12)
    return kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)


@pytest.fixture
def exported(model, tmp_path):
    import export_transformers_js

    export_transformers_js.export(model, tmp_path / "exported")
    return tmp_path / "exported"
