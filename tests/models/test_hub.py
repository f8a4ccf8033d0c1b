"""Models that keras_hub uploads to Hugging Face, and reads from there."""

import pathlib
import shutil
import warnings

import keras_hub
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data.tokenizing import tokenize
from tests.helpers import CONTEXT, tiny_metaclip
from tests.training.test_model_tokenizer import METACLIP_END, hugging_face

pytestmark = pytest.mark.any_backend
ADDRESS, TEXTS = "hf://me/my_clip", ["a red cat", "a dog"]


def clip():
    tokenizer = kcm.data.CLIPTokenizer.train(TEXTS * 4, 540, CONTEXT)
    size = tokenizer.vocabulary_size
    backbone = kcm.models.clip_backbone("tiny", 16, size, CONTEXT, 4)
    return kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)


def metaclip_with_a_tokenizer_of_hugging_face():
    tokenizer = hugging_face(METACLIP_END, model_max_length=CONTEXT)
    return kcm.ContrastiveModel.from_backbone(tiny_metaclip(), tokenizer=tokenizer)


@pytest.mark.parametrize("make", [clip, metaclip_with_a_tokenizer_of_hugging_face])
def test_an_uploaded_model_comes_back_with_its_tokenizer(
    hub, make, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = make()
    model.save_to_preset("my_clip")
    keras_hub.upload_preset(ADDRESS, "my_clip")
    card = (hub("me/my_clip") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: keras-hub\n---\n")
    # The folder stays as it was.
    assert not pathlib.Path("my_clip", "README.md").exists()
    shutil.copytree("my_clip", "my_folder")
    shutil.rmtree("my_clip")
    for preset in (ADDRESS, "my_folder", "./my_folder", pathlib.Path("my_folder")):
        loaded = kcm.ContrastiveModel.from_preset(preset)
        ids = tokenize(loaded.tokenizer, TEXTS)
        np.testing.assert_array_equal(ids, tokenize(model.tokenizer, TEXTS))
        found, expected = (x.encode_text(TEXTS) for x in (loaded, model))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_uploaded_backbone_has_no_tokenizer(hub, tmp_path):
    clip().backbone.save_to_preset(tmp_path)
    keras_hub.upload_preset(ADDRESS, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert kcm.ContrastiveModel.from_preset(ADDRESS).tokenizer is None
