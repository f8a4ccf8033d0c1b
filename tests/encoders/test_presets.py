"""Encoders by the names, folders and addresses of their presets."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.docs.conftest import TRANSFORMER
from tests.encoders.test_pooled import bert
from tests.helpers import vit_encoder

pytestmark = pytest.mark.any_backend
keras_hub = pytest.importorskip("keras_hub")


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    folder, shape = tmp_path_factory.mktemp("presets"), (56, 56, 3)
    dino = keras_hub.models.DINOV2Backbone(
        patch_size=14, image_shape=shape, position_embedding_shape=shape, **TRANSFORMER
    )
    dino.save_to_preset(folder / "dino")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]
    pack = keras_hub.models.BertTextEmbedderPreprocessor(
        keras_hub.models.BertTokenizer(vocabulary=words), sequence_length=16
    )
    text = keras_hub.models.BertBackbone(
        len(words), max_sequence_length=16, **TRANSFORMER
    )
    keras_hub.models.BertTextEmbedder(text, pack).save_to_preset(folder / "text")
    vit_encoder().save_to_preset(folder / "vit")
    return folder


def connected(presets, image="dino", **options):
    return kcm.ContrastiveModel.from_encoders(
        f"{presets}/{image}", f"{presets}/text", projection_dim=4, **options
    )


def test_presets_are_loaded_with_their_weights_and_tokenizer(presets):
    model = connected(presets, image_size=28)
    given = keras_hub.models.DINOV2Backbone.from_preset(
        str(presets / "dino"), image_shape=(28, 28, 3)
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3)).astype("uint8")
    expected = kcm.ContrastiveModel.from_encoders(
        given, keras_hub.models.TextEmbedder.from_preset(str(presets / "text"))
    )
    np.testing.assert_array_equal(
        *(x.image_encoder.predict(images, verbose=0) for x in (model, expected))
    )
    assert model.encode_text(["dog"]).shape == (1, 4)


def test_uploaded_encoders_are_connected_and_uploaded(presets, hub):
    for name in ("dino", "text"):
        keras_hub.upload_preset(f"hf://me/{name}", str(presets / name))
    model = connected("hf://me", image_size=28)
    model.save("hf://me/both")
    assert (hub("me/both") / "README.md").exists()
    loaded = keras.saving.load_model("hf://me/both")
    found, expected = (x.encode_text(["dog"]) for x in (loaded, model))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_images_have_224_pixels_unless_another_size_is_given(presets):
    assert connected(presets).preprocessing["image_size"] == (224, 224)
    assert connected(presets, image_size=42).preprocessing["image_size"] == (42, 42)


def test_a_path_may_be_a_path_object(presets):
    model = kcm.ContrastiveModel.from_encoders(
        presets / "dino", presets / "text", image_size=42, projection_dim=4
    )
    assert model.preprocessing["image_size"] == (42, 42)


def test_an_encoder_of_one_size_is_resized(presets):
    model = connected(presets, "vit", image_size=32)
    assert model.preprocessing["image_size"] == (32, 32)


@pytest.mark.parametrize(("kind", "size"), [("dino", 30), ("vit", 30)])
def test_a_size_that_patches_do_not_fill_is_refused(presets, kind, size):
    with pytest.raises(ValueError, match=r"`image_size` must be divisible.*size=30, "):
        connected(presets, kind, image_size=size)


def test_a_path_without_a_folder_is_refused(presets):
    with pytest.raises(ValueError, match=r"no preset in .*typo[^$]*Received: .*typo'"):
        connected(presets, "typo")


def test_a_size_for_a_model_is_refused(presets):
    encoder = vit_encoder()
    with pytest.raises(ValueError, match=r"`image_size`.*Received: image_size=64, "):
        kcm.ContrastiveModel.from_encoders(encoder, bert(), image_size=64)
