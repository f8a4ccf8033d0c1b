"""clip_benchmark's metrics, against NumPy's of the same embeddings."""

import io
import json
import os
import pathlib
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark import models
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.data.images import Cutter
from keras_cluster_mask.evaluation.preprocessing import resize_image
from keras_cluster_mask.interop.clip_benchmark import adapt, main, repaired
from keras_cluster_mask.models.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
)
from tests.helpers import (
    VOCABULARY,
    functional_vit,
    patch_mlp,
    random_images,
    random_pairs,
    text_bag,
    tiny_clip,
    tiny_siglip,
    to_numpy,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLASSES = ["cat", "dog", "red car", "blue boat", "tree", "house"]
TEMPLATES = ["a photo of a {c}.", "{c}", "a drawing of a {c}."]
# Captions of each image, some with more than others.
CAPTIONS = [
    [f"a {name} {place}" for place in places[: 1 + index % 3]]
    for places in (("in the snow", "at night", "from above"), ("here", "there", "lost"))
    for index, name in enumerate(CLASSES)
]
ALL_CAPTIONS = [caption for captions in CAPTIONS for caption in captions]
SUGARCREPE = [
    "add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att",
    "swap_obj",
]  # fmt: skip
LABELS = np.arange(13) % len(CLASSES)


def ids_of(texts, length=6):
    """A tokenizer of another library's: a start, the letters, and the end."""
    ids = np.full((len(texts), length), VOCABULARY - 1)
    ids[:, 0] = 0
    for row, text in zip(ids, texts):
        letters = [1 + ord(letter) % (VOCABULARY - 2) for letter in text[: length - 2]]
        row[1 : 1 + len(letters)] = letters
    return ids


def encoded_images(count):
    """Encoded images of noise, each of another size."""
    rng = np.random.default_rng(0)
    for index in range(count):
        shape = (20 + index, 31 - index, 3)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, shape, "uint8")).save(file, "PNG")
        yield file.getvalue()


@pytest.fixture
def write_dataset(tmp_path, write_tar):
    """Writes two shards in clip_benchmark's layout; returns their folder."""

    def write_dataset(name, extension, contents, **texts):
        (tmp_path / name / "test").mkdir(parents=True)
        samples = list(zip(encoded_images(len(contents)), contents))
        for shard, first in enumerate((0, 5)):
            files = []
            for index, (encoded, content) in list(enumerate(samples))[first:][:8]:
                if shard or index < 5:
                    key = f"{index:04}"
                    files += [(f"{key}.png", encoded), (f"{key}.{extension}", content)]
            write_tar(f"{name}/test/{shard}.tar", files)
        (tmp_path / name / "test" / "nshards.txt").write_text("2")
        for file, text in texts.items():
            (tmp_path / name / f"{file}.txt").write_text(text)
        return tmp_path / name

    return write_dataset


@pytest.fixture
def classification(write_dataset):
    return write_dataset(
        "classes",
        "cls",
        [b"%d" % label for label in LABELS],
        classnames="\n".join(CLASSES),
        zeroshot_classification_templates="\n".join(TEMPLATES),
    )


@pytest.fixture
def retrieval(write_dataset):
    texts = ["\n".join(lines).encode() for lines in CAPTIONS]
    return write_dataset("captions", "txt", texts, dataset_type="retrieval")


@pytest.fixture
def sugarcrepe(tmp_path):
    """SugarCrepe's layout: a JSON file a dataset, and images in one folder."""
    (tmp_path / "crepe" / "val2017").mkdir(parents=True)
    for index, content in enumerate(encoded_images(len(ALL_CAPTIONS))):
        (tmp_path / "crepe" / "val2017" / f"{index:012}.png").write_bytes(content)
    for shift, name in enumerate(SUGARCREPE, 1):
        # Indices have gaps.
        entries = {
            str(3 * index): {
                "filename": f"{index:012}.png",
                "caption": caption,
                "negative_caption": ALL_CAPTIONS[index - shift],
            }
            for index, caption in enumerate(ALL_CAPTIONS)
        }
        (tmp_path / "crepe" / f"{name}.json").write_text(json.dumps(entries))
    return tmp_path / "crepe"


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
    model = kcm.ContrastiveModel(image_encoder, text_encoder)
    # Far from alike, so that rounding decides nothing.
    rng = np.random.default_rng(0)
    for weight in model.trainable_variables:
        if len(weight.shape) > 1:
            weight.assign(rng.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    return model


@pytest.fixture
def files(model, tokenizer, tmp_path):
    """The paths of the model and of the tokenizer, saved."""
    paths = str(tmp_path / "model.keras"), str(tmp_path / "tokenizer.json")
    model.save(paths[0])
    tokenizer.save(paths[1])
    return paths


def embeddings_of(model, tokenizer, count, texts, resize="crop"):
    """What our own pipeline for evaluation and `predict` make of them."""
    cut = Cutter((16, 16), training=False, resize=resize)
    images = np.stack(
        [cut(content, np.random.default_rng(0)) for content in encoded_images(count)]
    )
    images = model.predict(
        {"images": images, "token_ids": np.zeros((count, 10), "int32")}, verbose=0
    )["image_embeddings"]
    texts = model.predict(
        {
            "images": np.zeros((len(texts), 16, 16, 3), "uint8"),
            "token_ids": tokenizer(texts),
        },
        verbose=0,
    )["text_embeddings"]
    return images, texts


def classification_metrics(model, tokenizer, resize="crop"):
    texts = [template.format(c=name) for name in CLASSES for template in TEMPLATES]
    images, texts = embeddings_of(model, tokenizer, len(LABELS), texts, resize)
    classes = texts.reshape(len(CLASSES), len(TEMPLATES), -1).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    ranks = np.argsort(-images @ classes.T, axis=1)
    first = ranks[:, 0] == LABELS
    return {
        "acc1": first.mean(),
        "acc5": (ranks[:, :5] == LABELS[:, None]).any(axis=1).mean(),
        "mean_per_class_recall": np.mean(
            [first[label == LABELS].mean() for label in range(len(CLASSES))]
        ),
    }


def retrieval_metrics(model, tokenizer, ks):
    images, texts = embeddings_of(model, tokenizer, len(CAPTIONS), ALL_CAPTIONS)
    owner = np.repeat(np.arange(len(CAPTIONS)), [len(x) for x in CAPTIONS])
    recall = kcm.evaluation.retrieval_recall(
        images, texts, np.arange(len(images)), owner, ks
    )
    metrics = {}
    for k in ks:
        metrics[f"image_retrieval_recall@{k}"] = recall[f"text_to_image_recall@{k}"]
        metrics[f"text_retrieval_recall@{k}"] = recall[f"image_to_text_recall@{k}"]
    return metrics


def command(files, folder, output, *options):
    model, tokenizer = files
    if tokenizer is not None:
        options += "--tokenizer", tokenizer
    return [
        "eval", "--model", "own", "--pretrained", model,
        "--dataset", f"wds/{folder.name}", "--dataset_root", str(folder),
        "--batch_size", "5", "--output", str(output), *options,
    ]  # fmt: skip


# === Metrics ===


def test_zero_shot_metrics_are_those_of_numpy(
    model, tokenizer, files, classification, tmp_path
):
    output = tmp_path / "result.json"
    given = list(sys.argv)
    assert main(command(files, classification, output)) == 0
    assert sys.argv == given
    result = json.loads(output.read_text())
    assert result["metrics"] == pytest.approx(classification_metrics(model, tokenizer))
    assert 0 < result["metrics"]["acc1"] < result["metrics"]["acc5"] < 1
    assert result["dataset"] == "wds/classes"
    assert (result["model"], result["pretrained"]) == ("own", files[0])


def test_retrieval_metrics_are_those_of_numpy(
    model, tokenizer, files, retrieval, tmp_path
):
    output = tmp_path / "result.json"
    options = "--task", "zeroshot_retrieval", "--recall_k", "2", "6"
    assert main(command(files, retrieval, output, *options)) == 0
    metrics = json.loads(output.read_text())["metrics"]
    assert metrics == pytest.approx(retrieval_metrics(model, tokenizer, (2, 6)))
    assert all(0 < value < 1 for value in metrics.values())


def test_sugarcrepe_gives_the_caption_selection_accuracy(
    model, tokenizer, files, sugarcrepe, tmp_path
):
    arguments = command(files, sugarcrepe, tmp_path / "{dataset}.json")
    arguments[arguments.index("wds/crepe")] = "sugar_crepe"
    assert main(arguments) == 0
    images, captions = embeddings_of(model, tokenizer, len(ALL_CAPTIONS), ALL_CAPTIONS)
    for shift, name in enumerate(SUGARCREPE, 1):
        result = json.loads((tmp_path / f"sugar_crepe_{name}.json").read_text())
        assert result["task"] == "image_caption_selection"
        expected = kcm.evaluation.caption_selection_accuracy(
            images, captions, np.roll(captions, shift, axis=0)
        )
        assert 0 < expected < 1
        for metric in ("acc", "text_acc"):
            assert result["metrics"][metric] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_the_command_runs_as_a_program(classification, tmp_path):
    # Of classes that a program has by itself.
    backbone = kcm.models.clip_backbone("tiny", image_size=16, context_length=10)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    model.save(tmp_path / "model.keras")
    tokenizer = kcm.data.CLIPTokenizer.from_open_clip(context_length=10)
    files = str(tmp_path / "model.keras"), None
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "keras_cluster_mask.interop.clip_benchmark"]
        + command(files, classification, tmp_path / "result.json"),
        env={
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "PYTHONPATH": os.pathsep.join(path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics == pytest.approx(classification_metrics(model, tokenizer))


def test_a_model_is_loaded_once_for_several_datasets(
    files, classification, tmp_path, monkeypatch
):
    loaded = []
    load_model = keras.saving.load_model
    monkeypatch.setattr(
        keras.saving,
        "load_model",
        lambda path, **kwargs: loaded.append(path) or load_model(path, **kwargs),
    )
    arguments = command(files, classification, tmp_path / "{dataset}.json")
    arguments.insert(arguments.index("wds/classes"), "wds/again")
    assert main(arguments) == 0
    assert len(loaded) == 1
    first, second = (
        json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
        for name in ("classes", "again")
    )
    assert first == second
    results = [str(tmp_path / f"{name}.json") for name in ("classes", "again")]
    assert main(["build", *results, "--output", str(tmp_path / "all.csv")]) == 0
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 3


@pytest.mark.any_backend
def test_help_tells_of_our_options_and_clip_benchmarks(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--tokenizer" in printed
    assert "--wds_cache_dir" in printed


# === clip_benchmark itself ===


def state_of_clip_benchmark():
    state = {name: id(value) for name, value in vars(zeroshot_classification).items()}
    return state, dict(models.TYPE2FUNC), list(models.MODEL_TYPES)


def test_clip_benchmark_stays_as_it_is(
    model, tokenizer, files, classification, tmp_path
):
    before = state_of_clip_benchmark()
    adapt(model, tokenizer)
    assert state_of_clip_benchmark() == before
    assert main(command(files, classification, tmp_path / "result.json")) == 0
    assert state_of_clip_benchmark() == before
    assert main(["eval", "--pretrained", str(tmp_path / "none.keras")]) == 2
    assert state_of_clip_benchmark() == before


@pytest.mark.any_backend
def test_accuracies_are_computed_while_clip_benchmark_is_repaired():
    scores = torch.eye(6)[:4] + 0.1
    before = state_of_clip_benchmark()
    labels = torch.tensor([0, 1, 0, 0])
    with repaired():
        with repaired():
            assert zeroshot_classification.accuracy(scores, labels) == [0.5]
        assert zeroshot_classification.accuracy(scores, labels) == [0.5]
    assert state_of_clip_benchmark() == before


# === Precision ===


def test_autocast_has_no_influence_on_embeddings(model, tokenizer):
    adapter, _, tokenize = adapt(model, tokenizer)
    images = torch.tensor(random_images(3).transpose(0, 3, 1, 2))
    ids = tokenize(CLASSES)
    expected = adapter.encode_image(images), adapter.encode_text(ids)
    with torch.no_grad(), torch.autocast("cpu", enabled=True):
        found = adapter.encode_image(images), adapter.encode_text(ids)
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_retrieval_metrics_are_the_same_with_amp(model, tokenizer):
    adapter, _, tokenize = adapt(model, tokenizer)
    images = torch.tensor(random_images(len(CAPTIONS)).transpose(0, 3, 1, 2))
    batches = [(images[:7], CAPTIONS[:7]), (images[7:], CAPTIONS[7:])]
    with_amp, without = (
        zeroshot_retrieval.evaluate(adapter, batches, tokenize, "cpu", amp, [1, 3])
        for amp in (True, False)
    )
    assert with_amp == without


def test_classes_come_out_the_same_with_amp(model, tokenizer):
    adapter, _, tokenize = adapt(model, tokenizer)
    with_amp, without = (
        zeroshot_classification.zero_shot_classifier(
            adapter, tokenize, CLASSES, TEMPLATES, "cpu", amp
        )
        for amp in (True, False)
    )
    assert torch.equal(with_amp, without)


# === What is handed to clip_benchmark ===

MODELS = {
    "clip": tiny_clip,
    "siglip": tiny_siglip,
    "own": lambda: kcm.ContrastiveModel(functional_vit(), text_bag()),
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_adapter_embeds_as_the_model_does(kind):
    model = MODELS[kind]()
    adapter, _, _ = adapt(model, ids_of)
    if kind != "own":
        model = getattr(kcm.ContrastiveModel, f"from_{kind}")(model)
    assert adapter.eval() is adapter
    assert adapter.to("cpu") is adapter
    pairs = random_pairs(5)
    mean, std = (SIGLIP_MEAN, SIGLIP_STD) if kind == "siglip" else (CLIP_MEAN, CLIP_STD)
    channels_first = torch.tensor(pairs["images"]).permute(0, 3, 1, 2)
    normalized = (channels_first / 255 - torch.tensor(mean)[:, None, None]) / (
        torch.tensor(std)[:, None, None]
    )
    # What `encode_image` and `encode_text` return, which JAX takes long for uncompiled.
    expected = model.predict(pairs, verbose=0)
    for images in (channels_first, normalized):
        found = adapter.encode_image(images)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected["image_embeddings"], atol=2e-6)
    found = adapter.encode_text(torch.tensor(pairs["token_ids"]).long())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected["text_embeddings"], atol=2e-6)
    if kind == "own":
        embedded = to_numpy(model.encode_image(pairs["images"]))
        np.testing.assert_allclose(embedded, expected["image_embeddings"], atol=2e-6)


def bert_model():
    """A model whose text tower takes three inputs, of any length."""
    names = ["token_ids", "padding_mask", "segment_ids"]
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in names}
    x = keras.layers.Embedding(VOCABULARY, 16)(inputs["token_ids"])
    x = x + keras.layers.Embedding(2, 16)(inputs["segment_ids"])
    mask = keras.ops.cast(inputs["padding_mask"], "float32")[..., None]
    x = keras.ops.sum(x * mask, 1) / keras.ops.maximum(keras.ops.sum(mask, 1), 1.0)
    text = keras.Model(inputs, x, name="text_encoder")
    return kcm.ContrastiveModel(functional_vit(), text)


@pytest.mark.parametrize("length", [6, 9])
def test_a_text_tower_of_several_inputs_and_any_length_is_taken(length):
    model = bert_model()

    def padded_ids(texts):
        return np.pad(np.maximum(ids_of(texts), 1), [(0, 0), (0, length - 6)])

    adapter, _, tokenize = adapt(model, padded_ids)
    ids = tokenize(CLASSES)
    assert ids.shape == (len(CLASSES), length)
    np.testing.assert_allclose(
        adapter.encode_text(ids), to_numpy(model.encode_text(ids.numpy())), atol=2e-6
    )


def test_batches_of_any_size_are_taken():
    model = kcm.ContrastiveModel(functional_vit(), text_bag())
    adapter, _, _ = adapt(model, ids_of)
    images = torch.tensor(random_images(9).transpose(0, 3, 1, 2))
    whole = adapter.encode_image(images[:4]), adapter.encode_image(images)
    assert torch.allclose(whole[0], whole[1][:4], atol=2e-6)
    for count in (4, 1, 0):
        part = adapter.encode_image(images[:count])
        assert part.shape == (count, 16)
        assert torch.allclose(part, whole[1][:count], atol=2e-6)


@pytest.mark.any_backend
@pytest.mark.parametrize("size", [(40, 23), (5, 9)])
def test_the_transform_is_open_clips(size, model, tokenizer):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 4), "uint8")
    image = Image.fromarray(pixels)
    reference = open_clip.image_transform(16, False, CLIP_MEAN, CLIP_STD)(image)
    _, transform, _ = adapt(model, tokenizer)
    found = transform(image)
    assert found.dtype == torch.uint8
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    assert torch.allclose((found / 255 - mean) / std, reference, atol=1e-6)


@pytest.mark.any_backend
def test_images_are_squashed_if_asked_to(model, tokenizer):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 23, 3), "uint8")
    image = Image.fromarray(pixels)
    reference = open_clip.image_transform(
        16, False, CLIP_MEAN, CLIP_STD, resize_mode="squash"
    )(image)
    _, transform, _ = adapt(model, tokenizer, resize="squash")
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    found = (transform(image) / 255 - mean) / std
    assert torch.allclose(found, reference, atol=1e-6)
    with pytest.raises(ValueError, match=r"`resize` must.*Received: resize='pad'"):
        adapt(model, tokenizer, resize="pad")


def test_the_command_squashes_images_if_asked_to(
    model, tokenizer, files, classification, tmp_path, monkeypatch
):
    def resized(image, image_size, resize):
        seen.append(resize)
        return resize_image(image, image_size, resize)

    seen = []
    place = "keras_cluster_mask.interop.clip_benchmark.resize_image"
    monkeypatch.setattr(place, resized)
    arguments = command(files, classification, tmp_path / "result.json")
    assert main([*arguments, "--resize", "squash"]) == 0
    assert {*seen} == {"squash"}
    found = json.loads((tmp_path / "result.json").read_text())["metrics"]
    expected = classification_metrics(model, tokenizer, resize="squash")
    assert found == pytest.approx(expected)


@pytest.mark.any_backend
def test_texts_are_one_or_many(tokenizer, model):
    _, _, tokenize = adapt(model, tokenizer)
    assert torch.equal(tokenize("a cat"), tokenize(["a cat"]))
    assert tokenize("a cat").dtype == torch.int64
    np.testing.assert_array_equal(tokenize(CLASSES), tokenizer(CLASSES))


@pytest.mark.any_backend
def test_by_default_texts_become_clips_tokens():
    backbone = kcm.models.clip_backbone("tiny", image_size=16, context_length=20)
    _, _, tokenize = adapt(backbone)
    expected = open_clip.get_tokenizer("ViT-B-32", context_length=20)(CAPTIONS[2])
    assert torch.equal(tokenize(CAPTIONS[2]), expected)


def test_a_preset_of_keras_hub_is_a_model(tmp_path):
    backbone = tiny_clip()
    backbone.save_to_preset(str(tmp_path / "preset"))
    images = torch.tensor(random_images(2).transpose(0, 3, 1, 2))
    found, expected = (
        adapt(model, ids_of)[0].encode_image(images)
        for model in (tmp_path / "preset", backbone)
    )
    assert torch.equal(found, expected)


# === Bad input ===


@pytest.mark.any_backend
def test_a_file_that_is_not_there_or_no_model_is_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"`model`.*Received: model=.*none"):
        adapt(tmp_path / "none.keras")
    for name in ("text.keras", "model.bin"):
        (tmp_path / name).write_text("no model")
        with pytest.raises(ValueError, match=rf"`model`.*Received: model=.*{name}"):
            adapt(tmp_path / name)
    assert main(["eval", "--pretrained", str(tmp_path / "none.keras")]) == 2
    printed = capsys.readouterr().err
    assert "none.keras" in printed
    assert printed.count("\n") == 1


@pytest.mark.any_backend
def test_models_of_another_kind_are_refused(tmp_path):
    for model in (text_bag(), 3):
        with pytest.raises(ValueError, match=r"ContrastiveModel.*Received: model="):
            adapt(model)
    hub = keras_hub.models.ViTBackbone
    vit = hub(image_shape=(16, 16, 3), patch_size=4, num_layers=1, num_heads=2,
              hidden_dim=16, mlp_dim=32)  # fmt: skip
    vit.save(tmp_path / "vit.keras")
    with pytest.raises(ValueError, match=r"ContrastiveModel.*Received: model="):
        adapt(tmp_path / "vit.keras")


@pytest.mark.any_backend
def test_a_model_without_towers_is_refused():
    class Own(keras.Model):
        def call(self, images):
            return keras.ops.mean(images, axis=(1, 2))

    model = kcm.ContrastiveModel(Own(), text_bag(width=3))
    with pytest.raises(ValueError, match=r"functional.*Received:"):
        adapt(model, ids_of)


@pytest.mark.any_backend
def test_an_image_encoder_of_any_size_is_refused():
    images = keras.Input((None, None, 3))
    x = keras.layers.GlobalAveragePooling2D()(images)
    model = kcm.ContrastiveModel(keras.Model(images, x), text_bag(width=3))
    with pytest.raises(ValueError, match=r"one size.*Received: .*None, None, 3"):
        adapt(model, ids_of)


@pytest.mark.any_backend
def test_a_tokenizer_that_is_not_the_models_is_refused(tokenizer):
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    with pytest.raises(ValueError, match=r"`tokenizer`.*at most 6 .*ids of shape"):
        adapt(model, tokenizer)
    with pytest.raises(ValueError, match=r"`tokenizer`.*takes, 6. Received: .*, 5\)"):
        adapt(model, lambda texts: ids_of(texts, 5))
    message = r"\[0, 30\).*another tokenizer.*Received: ids from"
    with pytest.raises(ValueError, match=message):
        adapt(model)


@pytest.mark.any_backend
def test_a_tokenizer_without_special_tokens_is_refused_for_clip():
    def bare(texts):
        return ids_of(["".join(reversed(text)) for text in texts])[:, ::-1].copy()

    with pytest.raises(ValueError, match=r"`tokenizer` must .*start.*Received: "):
        adapt(tiny_clip(), bare)
    adapt(tiny_siglip(), bare)


@pytest.mark.any_backend
@pytest.mark.parametrize("option", [("--resize", "squash"), ("--tokenizer", "a.json")])
@pytest.mark.parametrize(
    "theirs",
    [
        ("eval", "--model_type", "open_clip"),
        ("eval", "--model_type=open_clip", "--dataset", "cifar10"),
        ("build", "a.json"),
    ],
)
def test_our_options_are_refused_where_they_would_have_no_effect(
    option, theirs, capsys
):
    assert main([*theirs, *option]) == 2
    printed = capsys.readouterr().err
    assert f"`{option[0]}` is only for `eval` with `--model_type keras`" in printed
    assert f"Received: {option[0]}={option[1]!r}" in printed


@pytest.mark.any_backend
def test_without_clip_benchmark_the_error_says_how_to_install_it(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("clip_benchmark")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["eval"]) == 2
    assert "pip install clip-benchmark" in capsys.readouterr().err
    with pytest.raises(ImportError, match="pip install clip-benchmark"):
        adapt("model.keras")
