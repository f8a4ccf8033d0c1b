import keras
import pytest

from keras_cluster_mask.distribution import tensorflow_data


def test_tensorflow_sees_no_gpu_unless_it_is_the_backend(monkeypatch):
    tf = pytest.importorskip("tensorflow")
    hidden = []
    monkeypatch.setattr(
        tf.config, "set_visible_devices", lambda *arguments: hidden.append(arguments)
    )
    assert tensorflow_data._import_tensorflow() is tf
    is_backend = keras.backend.backend() == "tensorflow"
    assert hidden == ([] if is_backend else [([], "GPU")])


def test_a_tensorflow_that_is_in_use_is_left_as_it_is(monkeypatch):
    tf = pytest.importorskip("tensorflow")

    def refuse(*arguments):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", refuse)
    assert tensorflow_data._import_tensorflow() is tf
