"""clip_benchmark's metrics of adapted models, against those of `kcm.evaluation`."""

import types

import keras
import numpy as np
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from clip_benchmark.webdataset_builder import PIL_to_bytes, convert_retrieval_dataset
from PIL import Image
from torchvision.transforms.functional import normalize

import keras_cluster_mask as kcm
from keras_cluster_mask.interop.clip_benchmark import adapt, repaired
from tests.helpers import (
    as_trained,
    assert_close,
    functional_vit,
    letters_as_tokens,
    patch_mlp,
    random_pairs,
    text_bag,
    tiny_clip,
    tiny_siglip,
)

pytestmark = pytest.mark.any_backend

CLASSES = ["cat", "dog", "red car", "blue boat", "tree", "house"]
TEMPLATES = ["a photo of a {c}.", "{c}", "a drawing of a {c}."]
LABELS = np.arange(13) % len(CLASSES)
# Captions of each image, some with more than others.
CAPTIONS = [
    [f"a {name} {place}" for place in places[: 1 + index % 3]]
    # Captions that an image has twice tie with one another.
    for places in (("in the snow", "at night", "from above"), ("here", "there", "here"))
    for index, name in enumerate(CLASSES)
]
ALL_CAPTIONS = [caption for captions in CAPTIONS for caption in captions]


def photos(count):
    """Images of noise, each of another size."""
    rng = np.random.default_rng(0)
    for index in range(count):
        shape = (20 + index, 31 - index, 3)
        yield Image.fromarray(rng.integers(0, 256, shape, "uint8"))


def our_images(count, resize="crop"):
    """The same images as our own pipeline for evaluation makes them."""
    rows = [{"image": np.array(photo)} for photo in photos(count)]
    options = {"resize": resize}
    (batch,) = kcm.data.image_text_dataset(rows, None, 16, count, False, **options)
    return batch["images"]


class Batches(list):
    """A data loader, as far as clip_benchmark asks."""

    dataset = types.SimpleNamespace(classes=CLASSES)


def batches(transform, others, size=5):
    """Batches of transformed images and of what belongs to them."""
    images = torch.stack([transform(photo) for photo in photos(len(others))])
    starts = range(0, len(others), size)
    return Batches((images[i : i + size], others[i : i + size]) for i in starts)


@pytest.fixture(scope="module")
def tokenizer():
    return kcm.data.CLIPTokenizer.train(
        CLASSES + TEMPLATES + ALL_CAPTIONS, 600, context_length=10
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    ids = keras.Input((10,), dtype="int32")
    x = keras.layers.Embedding(tokenizer.vocabulary_size, 16)(ids)
    x = keras.layers.Dense(16)(keras.layers.Flatten()(x))
    text_encoder = keras.Model(ids, x, name="text")
    image_encoder = kcm.with_masking(
        patch_mlp(), kcm.ClusterMasking(4), layer="positions"
    )
    # Far from alike, so that rounding decides nothing.
    return as_trained(kcm.ContrastiveModel(image_encoder, text_encoder))


# === Metrics ===


def assert_ours(found, ours, ks):
    """Compares recall that clip_benchmark has found with that of `kcm.evaluation`."""
    for k in ks:
        for theirs, name in {"text": "image_to_text", "image": "text_to_image"}.items():
            recall = found[f"{theirs}_retrieval_recall@{k}"]
            assert recall == pytest.approx(ours[f"{name}_recall@{k}"])
            assert 0 < recall < 1


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_zero_shot_metrics_are_ours(model, tokenizer, resize, monkeypatch):
    monkeypatch.setattr(model, "resize", resize)
    adapter, transform, tokenize = adapt(model, tokenizer)
    before = dict(vars(zeroshot_classification))
    with repaired():
        found = zeroshot_classification.evaluate(
            adapter,
            batches(transform, torch.tensor(LABELS)),
            tokenize,
            CLASSES,
            TEMPLATES,
            "cpu",
            amp=False,
        )
    assert vars(zeroshot_classification) == before
    data = our_images(len(LABELS), resize), LABELS
    ours = kcm.evaluation.evaluate_zero_shot(
        model, data, CLASSES, tokenizer, TEMPLATES, verbose=0
    )
    assert found == {
        "acc1": pytest.approx(ours["top_1"]),
        "acc5": pytest.approx(ours["top_5"]),
        "mean_per_class_recall": pytest.approx(ours["mean_per_class"]),
    }
    assert 0 < found["acc1"] < found["acc5"] < 1


def test_retrieval_metrics_are_ours_with_and_without_amp(model, tokenizer):
    adapter, transform, tokenize = adapt(model, tokenizer)
    data = {"images": our_images(len(CAPTIONS)), "captions": CAPTIONS}
    ours = kcm.evaluation.evaluate_retrieval(model, data, tokenizer, (2, 6), verbose=0)
    for amp in (True, False):
        found = zeroshot_retrieval.evaluate(
            adapter, batches(transform, CAPTIONS), tokenize, "cpu", amp, [2, 6]
        )
        assert_ours(found, ours, (2, 6))


def test_retrieval_metrics_on_its_own_shards_are_ours(
    model, tokenizer, tmp_path, monkeypatch
):
    # In place of eight processes.
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda pairs, **_: pairs)
    pairs = [*zip(photos(len(CAPTIONS)), CAPTIONS)]
    convert_retrieval_dataset(pairs, "test", tmp_path, transform=PIL_to_bytes("webp"))
    adapter, transform, tokenize = adapt(model, tokenizer)
    options = {"transform": transform, "task": "zeroshot_retrieval"}
    images, captions = zip(*build_dataset("wds/own", root=str(tmp_path), **options))
    data = [(torch.stack(images), captions)]
    found = zeroshot_retrieval.evaluate(adapter, data, tokenize, "cpu", False, [2])
    ours = kcm.evaluation.evaluate_retrieval(
        model,
        kcm.data.image_text_dataset(
            tmp_path / "test" / "0.tar", None, 16, 5, False, include_captions="all"
        ),
        tokenizer,
        2,
        verbose=0,
    )
    assert_ours(found, ours, [2])


# === What is handed to clip_benchmark ===

MODELS = {
    "clip": tiny_clip,
    "siglip": tiny_siglip,
    "own": lambda: kcm.ContrastiveModel(functional_vit(), text_bag()),
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_adapter_embeds_as_the_model_does(kind):
    model = MODELS[kind]()
    adapter, _, _ = adapt(model, letters_as_tokens)
    if kind != "own":
        model = kcm.ContrastiveModel.from_backbone(model)
    assert adapter.eval() is adapter
    assert adapter.to("cpu") is adapter
    pairs = random_pairs(5)
    pixels = torch.tensor(pairs["images"]).permute(0, 3, 1, 2)
    texts = adapter.encode_text(torch.tensor(pairs["token_ids"]).long())
    expected = model.predict(pairs, verbose=0)
    for images in (
        pixels,
        normalize(pixels / 255, model.pixel_mean, model.pixel_std),
    ):
        found = {
            "image_embeddings": adapter.encode_image(images),
            "text_embeddings": texts,
        }
        assert {x.dtype for x in found.values()} == {torch.float32}
        assert_close(found, expected, atol=2e-6)


def test_texts_are_one_or_many_read_by_the_tokenizer_that_is_given_or_of_the_model(
    tokenizer, model, monkeypatch
):
    adapted = [adapt(model, tokenizer)]
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    for *_, tokenize in [*adapted, adapt(model)]:
        assert torch.equal(tokenize("a cat"), tokenize(["a cat"]))
        assert tokenize("a cat").dtype == torch.int64
        np.testing.assert_array_equal(tokenize(CLASSES), tokenizer(CLASSES))


# === Bad input ===


def model_of_any_size():
    images = keras.Input((None, None, 3))
    x = keras.layers.GlobalAveragePooling2D()(images)
    return kcm.ContrastiveModel(keras.Model(images, x), text_bag(width=3))


def without_special_tokens(texts):
    return letters_as_tokens([text[::-1] for text in texts])[:, ::-1].copy()


@pytest.mark.parametrize(
    ("name", "make", "tokenizer"),
    [
        ("backbone", text_bag, letters_as_tokens),
        ("model", model_of_any_size, letters_as_tokens),
        ("tokenizer", tiny_siglip, None),
        ("tokenizer", tiny_clip, without_special_tokens),
        ("tokenizer", tiny_clip, "tokenizer.json"),
    ],
)
def test_bad_input_is_refused_by_name(name, make, tokenizer):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: "):
        adapt(make(), tokenizer)
