"""Two pre-trained encoders as one model: features, training, reload and tuning."""

import keras
import keras_hub
import numpy as np
import pytest
from PIL import Image, ImageOps

import keras_cluster_mask as kcm
from tests.conftest import DATASETS
from tests.helpers import FAST, assert_close, reloaded, values

pytestmark = pytest.mark.slow

SIZE = 84
PHOTOGRAPHS = {
    "astronaut": "a portrait of an astronaut",
    "chelsea": "the face of a cat",
    "coffee": "a cup of coffee on a table",
    "hubble_deep_field": "galaxies in deep space",
    "retina": "the retina of an eye",
    "rocket": "the launch of a rocket at night",
}


def drawings(path):
    """The drawings of a shard, as arrays."""
    options = dict(include_captions=True)
    data = kcm.data.image_text_dataset(path, None, SIZE, 64, False, **options)
    found = [(batch["images"], batch["captions"]) for batch in data]
    images, captions = (np.concatenate(x) for x in zip(*found))
    return {"images": images, "captions": [text for (text,) in captions]}


def photographs(change=lambda image: image):
    folder = DATASETS / "photographs"
    images = [Image.open(folder / f"{name}.jpg") for name in PHOTOGRAPHS]
    images = [change(image.resize((SIZE, SIZE))) for image in images]
    return {"images": np.stack(images), "captions": [*PHOTOGRAPHS.values()]}


@pytest.fixture(scope="module")
def train(tmp_path_factory, copy_pairs):
    """200 drawings and six photographs."""
    path = tmp_path_factory.mktemp("train") / "train.tar"
    few, six = drawings(copy_pairs("train-00000", path, 200)), photographs()
    images = np.concatenate([few["images"], six["images"]])
    return {"images": images, "captions": few["captions"] + six["captions"]}


@pytest.fixture(scope="module")
def text(encoders):
    text = keras_hub.models.TextEmbedder.from_preset(str(encoders / "all_minilm_l6_v2"))
    text.preprocessor.sequence_length = 24
    return text


@pytest.fixture(scope="module")
def masked(encoders, text, train, tmp_path_factory):
    """A masked model whose linear heads were trained on features of whole images."""
    keras.utils.set_random_seed(1)
    image = keras_hub.models.DINOV2Backbone.from_preset(
        str(encoders / "dinov2_small"), image_shape=(SIZE, SIZE, 3)
    )
    image.trainable = text.trainable = False
    model = kcm.ContrastiveModel.from_encoders(
        image, text, projection_dim=128, masking=kcm.RandomMasking(0.5)
    )
    folder = tmp_path_factory.mktemp("features")
    features = kcm.compute_features(model, train, folder, verbose=0)
    model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.1), **FAST)
    model.fit(features, batch_size=64, epochs=30, verbose=0)
    return model


@pytest.fixture(scope="module")
def test(tmp_path_factory, copy_pairs):
    """60 drawings that are not trained on."""
    path = tmp_path_factory.mktemp("test") / "test.tar"
    return drawings(copy_pairs("test-00000", path, 60))


def test_drawings_that_were_not_trained_on_are_found(masked, test):
    found = kcm.evaluation.evaluate_retrieval(masked, test, ks=6, verbose=0)
    # Chance finds 10 %.
    assert found["image_to_text_recall@6"] > 0.25
    assert found["text_to_image_recall@6"] > 0.25


def test_a_mirrored_photograph_finds_its_caption_among_all(masked, train):
    data = photographs(ImageOps.mirror)
    images = kcm.evaluation.embed(masked, data, verbose=0)["image_embeddings"]
    texts = masked.encode_text(train["captions"])
    best = np.argmax(images @ texts.T, axis=1)
    assert [train["captions"][row] for row in best] == data["captions"]


def test_a_reloaded_model_is_tuned(masked, text, test, tmp_path):
    pairs = {"images": test["images"][:16]}
    tokens = text.preprocessor(test["captions"][:16])
    pairs |= {name: keras.ops.convert_to_numpy(x) for name, x in tokens.items()}
    model = reloaded(masked, tmp_path)
    assert_close(*(x.predict(pairs, verbose=0) for x in (model, masked)), atol=1e-5)
    assert len(model.trainable_variables) == len(masked.trainable_variables) == 3
    backbone = model.image_encoder.encoder.backbone
    backbone.trainable = True
    weights = backbone.trainable_variables
    before = values(weights)
    model.compile(keras.optimizers.AdamW(1e-5), **FAST)
    history = model.fit(pairs, batch_size=16, epochs=2, verbose=0).history
    assert history["mask_ratio"] == [0.5, 0.5]
    assert history["loss"][1] < history["loss"][0]
    moved = [np.any(one != two) for one, two in zip(before, values(weights))]
    # The mask token and the positions of other image sizes are not used.
    assert sum(moved) >= len(moved) - 2
