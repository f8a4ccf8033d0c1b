"""From images and texts to embeddings."""

import copy
import re

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.towers import ImageTower, TextTower
from keras_cluster_mask.models.two_towers import FIXED
from tests.encoders.test_pooled import bert
from tests.helpers import (
    CONTEXT,
    assert_close,
    assert_same_values,
    clip_vision_encoder,
    functional_vit,
    ids_of,
    image_mlp,
    letters_as_tokens,
    masked_vit,
    random_pairs,
    reloaded,
    small_model,
    text_bag,
    tiny_clip,
    tiny_metaclip,
    to_numpy,
    value_and_gradients,
    vit_encoder,
)


@pytest.mark.one_case
@pytest.mark.parametrize("projection_dim", [None, 5])
def test_embeddings_are_float32_unit_vectors_of_the_common_width(projection_dim):
    model = small_model(projection_dim=projection_dim)
    pairs = random_pairs(3)
    embeddings = model(pairs)
    assert set(embeddings) == {"image_embeddings", "text_embeddings"}
    for value in embeddings.values():
        assert tuple(value.shape) == (3, projection_dim or 16)
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        np.testing.assert_allclose(np.linalg.norm(to_numpy(value), axis=1), 1, 0, 1e-5)
    alone = {
        "image_embeddings": model.encode_image(pairs["images"]),
        "text_embeddings": model.encode_text(pairs["token_ids"]),
    }
    assert_same_values(embeddings, alone)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make",
    [
        lambda masking: kcm.ContrastiveModel.from_backbone(
            tiny_clip(), masking=masking
        ),
        lambda masking: kcm.ContrastiveModel.from_encoders(
            vit_encoder(), bert(), projection_dim=8, masking=masking
        ),
    ],
)
def test_each_model_has_its_masking(make, tmp_path):
    model = make(kcm.RandomMasking(0.5))
    for each in (model, reloaded(model, tmp_path)):
        assert each.masking is each.image_encoder.masking
    assert make(None).masking is model.without_masking().masking is None


@pytest.mark.any_backend
def test_parts_are_fixed_and_options_are_checked_when_assigned():
    backbone = tiny_clip()
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=kcm.RandomMasking(0.5))
    for name in FIXED:
        before = getattr(model, name)
        with pytest.raises(AttributeError, match=f"`{name}` .* fixed.*Received: "):
            setattr(model, name, None)
        assert getattr(model, name) is before
    for name, value in {"duplicates": "drop", "micro_batch_size": 0}.items():
        with pytest.raises(ValueError, match=f"`{name}`.*Received: "):
            setattr(model, name, value)


@pytest.mark.any_backend
def test_a_model_of_the_towers_of_another_shares_them(tmp_path):
    model = small_model(projection_dim=5)
    other = kcm.ContrastiveModel(model.image_tower, model.text_tower, head=model.head)
    assert ids_of(other.weights) == ids_of(model.weights)
    assert_same_values(reloaded(other, tmp_path).weights, model.weights)
    images = keras.layers.Dense(5)
    towers = ImageTower(image_mlp(12), images), TextTower(text_bag(), None)
    with pytest.raises(ValueError, match=r"same width.*Received: "):
        kcm.ContrastiveModel(image_mlp(12), text_bag())
    assert kcm.ContrastiveModel(*towers).image_tower.projection is images


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make",
    [
        lambda: small_model(projection_dim=5),
        lambda: kcm.ContrastiveModel(
            masked_vit(kcm.ClusterMasking(patch_size=4)), text_bag()
        ),
        lambda: kcm.ContrastiveModel.from_backbone(
            tiny_clip(), masking=kcm.RandomMasking()
        ),
        lambda: kcm.ContrastiveModel.from_backbone(tiny_metaclip()),
    ],
    ids=["plain", "masked", "clip", "metaclip"],
)
def test_the_summary_shows_shapes_and_counts_each_weight_once(make, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    model, lines = make(), []
    model.summary(print_fn=lines.append)
    rows = re.findall(r"^│ (\w+) .*│ (.*?) *│ +([\d,]+) │$", lines[0], re.MULTILINE)
    assert [name for name, *_ in rows] == [layer.name for layer in model.layers]
    assert all(shape.startswith("(None") for _, shape, _ in rows[:2])
    counts = [int(count.replace(",", "")) for *_, count in rows]
    assert sum(counts) == model.count_params()


@pytest.mark.any_backend
def test_projections_are_matrices_without_a_bias():
    model = kcm.ContrastiveModel(image_mlp(12), text_bag(16), projection_dim=5)
    encoders = len(model.image_encoder.weights) + len(model.text_encoder.weights)
    # Two projections, the temperature, and whether both are trained.
    assert len(model.weights) == encoders + 2 + 2
    assert tuple(model.text_tower.projection.kernel.shape) == (16, 5)
    images = np.ones((1, 16, 16, 3), "float32")
    kernel = to_numpy(model.image_tower.projection.kernel)
    expected = to_numpy(model.image_encoder(images)) @ kernel
    expected /= np.linalg.norm(expected)
    assert_close(model.encode_image(images), expected, 1e-5)


def test_a_zero_feature_has_a_finite_embedding_and_gradient():
    model = small_model()
    kernel = model.image_encoder.layers[-1].kernel
    kernel.assign(np.zeros(kernel.shape))
    pairs = random_pairs(3)
    embeddings, found = value_and_gradients(
        lambda: (ops.sum(x := model.encode_image(pairs["images"])), x),
        model.image_encoder.trainable_variables,
    )
    assert (embeddings == 0).all()
    assert all(np.isfinite(g).all() for g in found)


@pytest.mark.any_backend
def test_inputs_that_a_model_cannot_take_are_refused():
    model = small_model()
    for message, call, given in (
        (r"set `model.tokenizer`", model.encode_text, ["a red heart"]),
        (r"set `model.tokenizer`", model.encode_text, "a red heart"),
        (r"`texts` must be strings, or rows", model.encode_text, ["a", [5]]),
        (r"`texts` must be strings, or rows", model.encode_text, None),
        (r"`images` must be a list", model.encode_image, None),
        (r"`images` must contain at least one item", model.encode_image, []),
        (r"`save_to_preset` is for models", model.save_to_preset, "folder"),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*Received"):
            call(given)


def tensorflow_strings(words):
    return pytest.importorskip("tensorflow").constant(words)


@pytest.mark.one_case
@pytest.mark.parametrize("make", [list, tuple, np.array, iter, tensorflow_strings])
def test_words_and_images_of_any_size_become_arrays_of_embeddings(make):
    words = ["a red heart", "b"]
    model = small_model(tokenizer=letters_as_tokens)
    found = model.encode_text(make(words))
    assert isinstance(found, np.ndarray)
    assert_close(found, model.encode_text(letters_as_tokens(words)))
    assert ops.is_tensor(model.encode_text(words, training=True))
    assert_close(model.encode_text(map(list, letters_as_tokens(words))), found)
    images = random_pairs(3)["images"]
    found = model.encode_image([*images])
    assert isinstance(found, np.ndarray)
    assert_close(found, model.encode_image(images))
    assert ops.is_tensor(model.encode_image([*images], training=True))


@pytest.mark.any_backend
def test_one_text_and_one_image_are_batches_of_one(tmp_path):
    model = small_model(tokenizer=letters_as_tokens)
    expected = model.encode_text(["a red heart"])
    for text in ("a red heart", b"a red heart", tensorflow_strings("a red heart")):
        assert_same_values(model.encode_text(text), expected)
    image, path = Image.new("RGB", (20, 30), "red"), tmp_path / "red.png"
    image.save(path)
    expected = model.encode_image([image])
    assert expected.shape == (1, 16)
    for each in (image, path, str(path)):
        assert_same_values(model.encode_image(each), expected)


@pytest.mark.any_backend
def test_a_head_is_copied_with_its_model_alone():
    model = small_model()
    with pytest.raises(TypeError, match=r"`copy\.deepcopy\(model\)`.*Received: head="):
        copy.deepcopy(model.head)
    assert copy.deepcopy(kcm.models.ContrastiveHead("sigmoid")).loss == "sigmoid"


@pytest.mark.any_backend
def test_an_encoder_that_returns_tokens_is_refused():
    model = kcm.ContrastiveModel(functional_vit(pool=False), text_bag())
    with pytest.raises(ValueError, match=r"add a pooling.*Received: own_vit"):
        model(random_pairs(2))


@pytest.mark.any_backend
def test_inputs_of_another_shape_name_the_options_that_must_agree():
    model = small_model()
    with pytest.raises(ValueError, match=r"`images` must .*`image_size`.*Received:"):
        model.encode_image(np.ones((2, 8, 8, 3), "uint8"))
    ids = np.ones((2, CONTEXT - 1), "uint8")
    with pytest.raises(ValueError, match=r"`token_ids` .*`context_length`.*Received:"):
        model.encode_text(ids)


@pytest.mark.any_backend
def test_an_own_encoder_around_a_fresh_clip_has_its_patches_numbered():
    vit = clip_vision_encoder()
    pooled = keras.layers.GlobalAveragePooling1D()(vit(images := vit.input["images"]))
    kcm.ContrastiveModel(keras.Model(images, pooled), text_bag())
    ids = ops.convert_to_numpy(vit.embedding.position_ids)
    assert_same_values(ids, [np.arange(17)])


# === Search ===


def test_search_returns_the_best_photographs_or_their_numbers(tmp_path):
    model = small_model(tokenizer=letters_as_tokens)
    paths = [tmp_path / f"{level}.png" for level in (0, 60, 120, 180, 240)]
    for path in paths:
        Image.new("RGB", (20, 16), (int(path.stem), 40, 90)).save(path)
    embeddings = model.encode_image(paths)
    scores = embeddings @ model.encode_text("a dog")[0]
    expected = np.argsort(-scores, kind="stable").tolist()
    assert model.search(embeddings, "a dog", k=3) == expected[:3]
    assert model.search(paths, "a dog", k=2) == [paths[n] for n in expected[:2]]
    assert len(model.search(paths, "a dog", k=9)) == 5


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "`k` must be an integer.*Received: k=0"),
        ({"text": ["a dog"]}, r"`text` must be a string.*Received: text=\['a dog'\]"),
        ({"photos": np.ones((3, 7))}, r"`photos` must be.*Received: .*\(3, 7\)"),
        ({"photos": "holiday"}, r"`photos` must be.*glob.*Received: photos=holiday"),
    ],
)
def test_what_cannot_be_searched_is_refused(wrong, message):
    model = small_model(tokenizer=letters_as_tokens)
    with pytest.raises(ValueError, match=message):
        model.search(**{"photos": np.ones((3, 16)), "text": "a dog"} | wrong)
