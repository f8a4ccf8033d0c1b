import pathlib

import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data import examples

pytestmark = pytest.mark.any_backend

IMAGES = pathlib.Path(__file__).parents[2] / "datasets" / "images"


def test_it_is_the_folder_of_the_clone():
    assert kcm.data.example_images() == IMAGES
    assert len(kcm.data.list_shards(IMAGES / "train-*.tar")) == 4


def test_outside_of_a_clone_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "FOLDER", tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"pip install -e .*Received: .*images"):
        kcm.data.example_images()
