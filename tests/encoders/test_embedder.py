"""Arrays are embedded in few sizes of batches, and texts in order of their lengths."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.embedder import TEXTS, Embedder
from keras_cluster_mask.encoders.text_lengths import LEAST, rounded_up
from tests.encoders.test_pooled import bert, vit_encoder
from tests.helpers import (
    assert_close,
    image_mlp,
    random_images,
    random_pairs,
    text_bag,
    to_numpy,
)


def test_few_sizes_of_batches_are_compiled(monkeypatch):
    model, images = kcm.ContrastiveModel(image_mlp(), text_bag()), random_images(70)
    expected = to_numpy(model.encode_image(images))
    sizes = []
    predict = keras.Model.predict_on_batch
    monkeypatch.setattr(
        keras.Model,
        "predict_on_batch",
        lambda self, batch: sizes.append(len(batch)) or predict(self, batch),
    )
    embedder = Embedder(model)
    for count in (64, 5, 6, 70, 0, 20, 64):
        found = embedder.images(images[:count])
        assert_close(found, expected[:count], 2e-6)
    # One that is there already serves down to a quarter of it.
    assert sizes == [64, 8, 8, 70, 1, 64, 64]
    monkeypatch.setattr("keras_cluster_mask.encoders.embedder.MAX_SIZE", 32)
    assert embedder.images(images).shape == expected.shape
    assert sizes[-3:] == [64, 64, 8]


def test_channels_first_images_have_the_embeddings_of_channels_last_ones():
    # Float16, because oneDNN would compute others without XLA on some CPUs.
    on_tensorflow = keras.backend.backend() == "tensorflow"
    dtype = "mixed_float16" if on_tensorflow else "float32"
    models = {}
    for data_format in ("channels_first", "channels_last"):
        keras.config.set_image_data_format(data_format)
        backbone = kcm.models.clip_backbone("tiny", 16, 30, 6, 8, dtype=dtype)
        models[data_format] = kcm.ContrastiveModel.from_backbone(
            backbone, masking=kcm.RandomMasking()
        )
    first, last = models.values()
    first.set_weights(last.get_weights())
    images = random_pairs(4)["images"]
    found = Embedder(first).images(images.transpose(0, 3, 1, 2))
    expected = Embedder(last).images(images)
    tolerance = 5e-3 if on_tensorflow else 2e-6
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("with_mask", [False, True])
def test_texts_are_embedded_with_those_of_similar_lengths(with_mask, monkeypatch):
    width, half = 48, TEXTS // 2
    model = kcm.ContrastiveModel.from_encoders(
        vit_encoder(), bert(max_sequence_length=width), projection_dim=4
    )
    rng = np.random.default_rng(0)
    lengths = [30] * half + [LEAST + 1] * half + [LEAST] * TEXTS + [2] * 5
    lengths = rng.permutation(lengths)
    mask = np.arange(width) < lengths[:, None]
    ids = np.where(mask, rng.integers(3, 29, mask.shape), 0).astype("int32")
    inputs = {"token_ids": ids}
    if with_mask:
        # Without the mask, what it hides would be words.
        inputs = {"token_ids": ids + 1, "padding_mask": mask.astype("int32")}
    expected = to_numpy(model.text_tower(inputs))
    shapes, predict = [], keras.Model.predict_on_batch

    def record(self, batch):
        shapes.append([x.shape for x in batch.values()])
        return predict(self, batch)

    monkeypatch.setattr(keras.Model, "predict_on_batch", record)
    reported = []
    found = Embedder(model).texts(inputs, report=reported.append)
    assert_close(found, expected, 2e-6)
    assert reported == [TEXTS, TEXTS, 5]
    groups = [(TEXTS, rounded_up(30)), (TEXTS, LEAST), (8, LEAST)]
    assert shapes == [[shape] * len(inputs) for shape in groups]
