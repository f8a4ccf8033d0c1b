"""Features of frozen towers: computed once, resumed, and trained on."""

import itertools
import json
import os
import shutil

import keras
import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask import compute_features
from keras_cluster_mask.training import arrays
from keras_cluster_mask.training.features import FeatureBatches
from tests.data.reading import pairs_of as files_of
from tests.encoders.test_pooled import bert, make_model
from tests.helpers import (
    FAST,
    assert_close,
    assert_same_values,
    compiled_model,
    dino_encoder,
    letters_as_tokens,
    random_images,
    reloaded,
    split,
    values,
    vit_encoder,
)
from tests.models.conftest import seeded  # noqa: F401


def tokenizer(texts):
    return np.array([[3 + len(text) % 20, 5, 6, 0] for text in texts], "int32")


def dataset(images=20, captions=1, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (images, 16, 16, 3)).astype("uint8"),
        "captions": [
            tuple("x" * (3 * row + i + 1) for i in range(captions))
            for row in range(images)
        ],
    }


def pairs_of(data):
    """Images and the token ids of their only captions."""
    texts = [text for (text,) in data["captions"]]
    return {"images": data["images"], "token_ids": tokenizer(texts)}


SEVERAL_BLOCKS = {"image_blocks": [1, 2], "text_blocks": 2}


def frozen_model(**options):
    keras.utils.set_random_seed(0)
    layers = {"num_layers": 2 if "image_blocks" in options else 1}
    # Dropout is off where features are computed.
    encoders = lambda: dino_encoder(**layers), lambda: bert(dropout=0.0, **layers)
    model = make_model(*encoders, **options)
    model.image_encoder.trainable = model.text_encoder.trainable = False
    model.compile(keras.optimizers.SGD(0.5), **FAST)
    return model


def computed(model, folder, **options):
    return compute_features(model, dataset(**options), folder, tokenizer, verbose=0)


@pytest.fixture
def model():
    return frozen_model()


@pytest.fixture
def features(model, tmp_path):
    return computed(model, tmp_path)


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize("options", [SEVERAL_BLOCKS, {}])
def test_training_on_features_equals_training_on_images(options, tmp_path):
    model, other = frozen_model(**options), frozen_model(**options)
    features = computed(model, tmp_path)
    model.fit(features, batch_size=5, epochs=2, shuffle=False, verbose=0)
    pairs = pairs_of(dataset())
    other.fit(pairs, batch_size=5, epochs=2, shuffle=False, verbose=0)
    assert_close(model.trainable_variables, other.trainable_variables, atol=1e-5)
    logs = [model.evaluate(x, verbose=0, return_dict=True) for x in (features, pairs)]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], abs=1e-5)
    embeddings = [model.predict(x, verbose=0) for x in (features, pairs)]
    assert_close(*embeddings, atol=1e-5)


@pytest.mark.any_backend
@pytest.mark.parametrize("options", [{}, SEVERAL_BLOCKS])
def test_hidden_projections_see_standardized_features(options, tmp_path, monkeypatch):
    monkeypatch.setattr(kcm.training.features, "ROWS", 7)
    model = frozen_model(head="mlp", **options)
    features = computed(model, tmp_path / "a", captions=2)
    for _ in range(2):
        model.fit(features, batch_size=5, verbose=0)
        # Those of other features do not change the space that was learned.
        other = computed(model, tmp_path / "b", seed=1)
        model.fit(other, batch_size=5, verbose=0)
    pairs = features.pairs(slice(None), np.zeros(20, int))
    texts = np.concatenate(
        [features.pairs(slice(None), k)["text_features"] for k in (0, 1)]
    )
    for name, rows in (("image", pairs["image_features"]), ("text", texts)):
        layer = getattr(model, f"{name}_tower").projection.layers[0]
        spread = rows.std(axis=0, dtype="float64")
        expected = (
            rows.mean(axis=0, dtype="float64"),
            np.where(spread > 1e-4 * spread.mean(), spread, 1),
        )
        assert_close(layer.weights[:2], expected, atol=1e-4)
    models = model, reloaded(model, tmp_path)
    assert_same_values(*(x.predict(features, verbose=0) for x in models))


@pytest.mark.any_backend
def test_projections_that_were_trained_are_not_rescaled(tmp_path):
    model = frozen_model(head="mlp")
    features = computed(model, tmp_path)
    model.fit(pairs_of(dataset()), batch_size=5, verbose=0)
    # Also by another optimizer.
    model.compile(keras.optimizers.SGD(0.5), **FAST)
    model.fit(features, batch_size=5, verbose=0)
    mean, deviation, _ = values(model.image_tower.projection.layers[0].weights)
    assert not mean.any()
    assert np.all(deviation == 1)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("is_compiled", "message"), [(True, "in the first step"), (False, r"compile\(\)")]
)
def test_a_fit_that_fails_leaves_the_scaling_to_the_next_one(is_compiled, message):
    def fail(batch, logs):
        raise ValueError("in the first step")

    model = frozen_model(head="mlp")
    model.compiled = is_compiled
    callback = keras.callbacks.LambdaCallback(on_train_batch_begin=fail)
    with pytest.raises(ValueError, match=message):
        model.fit(pairs_of(dataset()), batch_size=5, verbose=0, callbacks=[callback])
    assert not values([model.image_tower.projection.layers[0].is_set])[0]


@pytest.mark.any_backend
def test_micro_batches_have_no_effect_on_features_and_need_not_fit(tmp_path):
    model, other = frozen_model(micro_batch_size=2), frozen_model()
    features = computed(model, tmp_path)
    for each in (model, other):
        each.fit(features, batch_size=5, shuffle=False, verbose=0)
    assert_same_values(model.trainable_variables, other.trainable_variables)


@pytest.mark.any_backend
def test_features_that_vary_by_rounding_alone_are_only_centered(features):
    rows = np.array(features._arrays["text_features"])
    rows[:, 1] = 0.3
    rows[::2, 1] += np.float32(1e-7)
    features._arrays["text_features"] = rows
    _, deviation = features.statistics("text")
    assert deviation[1] == 1
    assert np.all(deviation[2:] != 1)


def test_an_interrupted_run_resumes_with_the_next_batch(model, tmp_path):
    options = {"images": 150, "captions": 2}
    expected = computed(model, tmp_path / "whole", **options)
    calls = []

    def interrupted(texts):
        calls.append(len(texts))
        if calls.count(128) == 2:
            raise KeyboardInterrupt
        return tokenizer(texts)

    data, folder = dataset(150, 2), tmp_path / "parts"
    model.tokenizer = interrupted
    with pytest.raises(KeyboardInterrupt):
        compute_features(model, data, folder, interrupted, verbose=0)
    assert json.loads((folder / "features.json").read_text())["images"] == 64
    # A kill while a batch is written leaves a part of it.
    with open(folder / "image_features.npy", "ab") as file:
        file.write(b"part")
    with pytest.raises(ValueError, match=r"`folder` must contain .*Received: "):
        kcm.TowerFeatures(folder)
    calls.clear()
    found = compute_features(model, data, folder, interrupted, verbose=0)
    assert sum(calls) < 300
    assert_same_values(*(x.pairs(slice(None)) for x in (found, expected)))


@pytest.mark.any_backend
@pytest.mark.usefixtures("features")
def test_a_complete_folder_is_not_computed_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.image_tower, "features", None)
    found = computed(model, tmp_path)
    assert found.num_images == found.num_texts == 20


@pytest.mark.any_backend
def test_each_epoch_draws_one_caption_of_each_image(model, tmp_path, monkeypatch):
    features = computed(model, tmp_path, images=6, captions=3)
    # As any program reads it.
    whole = np.load(tmp_path / "image_features.npy")
    # All captions differ.
    labels = [features.pairs(slice(None), k)["caption_labels"] for k in range(3)]
    places = {
        label.tobytes(): divmod(i, 6) for i, label in enumerate(np.vstack(labels))
    }
    assert len(places) == 18
    # A batch has pairs of two epochs, and no more of the features is read.
    monkeypatch.setattr(features, "pairs", lambda images, captions: None)
    stream = FeatureBatches(features, 4)
    monkeypatch.undo()
    batches = [*itertools.islice(stream, 9)]
    epochs = zip(
        *(
            np.split(np.concatenate([batch[name] for batch in batches]), 6)
            for name in ("image_features", "caption_labels")
        )
    )
    seen = set()
    for images, texts in epochs:
        numbers, rows = np.transpose([places[text.tobytes()] for text in texts])
        assert sorted(rows) == [*range(6)]
        np.testing.assert_array_equal(images, whole[rows])
        seen.add(tuple(numbers[np.argsort(rows)]))
    assert len(seen) == 6


@pytest.mark.any_backend
def test_a_caption_has_one_label_whatever_its_batch_is_padded_to(model, tmp_path):
    def padded_to_the_longest(texts):
        texts = [x[:6] for x in texts]
        width = max(map(len, texts))
        return np.array([[3] * len(x) + [0] * (width - len(x)) for x in texts], "int32")

    data = dataset(3, captions=2)
    data["captions"] = [("aa", "a"), ("a", "aaaa"), ("aaaa", "aa")]
    found = compute_features(
        model, split(data, 1), tmp_path, padded_to_the_longest, verbose=0
    )
    first, second = (
        found.pairs(slice(None), k)["caption_labels"].tolist() for k in (0, 1)
    )
    assert first == [second[2], second[0], second[1]]
    assert first[0] != first[1] != first[2] != first[0]


@pytest.mark.any_backend
def test_processes_share_each_batch_of_features(model, tmp_path, monkeypatch):
    features = computed(model, tmp_path, captions=3)

    def labels_of(place):
        monkeypatch.setattr(arrays, "process_index_and_count", lambda training: place)
        keras.utils.set_random_seed(1)
        stream = iter(FeatureBatches(features, 10))
        return [next(stream)["caption_labels"] for _ in range(4)]

    parts = zip(*(labels_of((rank, 2)) for rank in range(2)))
    assert_same_values([*map(np.concatenate, parts)], labels_of((0, 1)))


@pytest.mark.any_backend
def test_features_of_other_weights_are_refused(model, features):
    weight = model.image_encoder.weights[0]
    weight.assign(weight + 1.0)
    for use in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=r"`features` .*towers.*Received: "):
            use(features, batch_size=5)


@pytest.mark.any_backend
def test_features_of_other_settings_are_refused(tmp_path):
    model, other = (
        make_model(lambda: vit_encoder(num_layers=3), image_blocks=[block, 3])
        for block in (1, 2)
    )
    other.set_weights(model.get_weights())
    computed(model, tmp_path)
    with pytest.raises(ValueError, match=r"`features` .*towers.*Received: "):
        computed(other, tmp_path)


@pytest.mark.any_backend
def test_features_of_another_precision_are_refused(features, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    message = r"`features` .*dtype\.0\.0: 'float32' then, 'bfloat16' now"
    with pytest.raises(ValueError, match=message):
        frozen_model().fit(features, batch_size=5)
    # A masking does not change features, whatever its precision.
    keras.config.set_dtype_policy("bfloat16")
    features = computed(frozen_model(), tmp_path / "16")
    features.check_model(frozen_model(masking=kcm.RandomMasking(0.5)))


@pytest.mark.any_backend
def test_other_batches_and_other_captions_are_refused(model, tmp_path, write_pairs):
    def stream(captions):
        options = {"training": False, "include_captions": True}
        options["caption_key"] = captions
        return kcm.data.image_text_dataset(source, None, 16, 3, **options)

    source = write_pairs("pairs.tar", 0, 6)
    one, other = dataset(6), dataset(6, seed=1)
    halves = split(one, 3)[:1]
    for number, (data, others) in enumerate(
        [(one, [other]), ([one], [[other], halves]), (stream(None), [stream("txt")])]
    ):
        folder = tmp_path / str(number)
        for _ in range(2):
            compute_features(model, data, folder, tokenizer, verbose=0)
        for each in others:
            with pytest.raises(ValueError, match=r"`features` .*data.*Received: "):
                compute_features(model, each, folder, tokenizer, verbose=0)


FILES, SAMPLES = "the sizes or dates of files", "the samples"


@pytest.fixture
def write_source(tmp_path, encode, write_tar):
    """Writes images, of equal sizes, as a source of a kind; returns it."""

    def write_source(kind, images, newer):
        if kind == "batches":
            captions = [f"a {number}" for number in range(len(images))]
            return split({"images": images, "captions": captions})
        if kind == "PIL":
            images = map(Image.fromarray, images)
        if kind in ("PIL", "arrays"):
            return [{"image": image, "caption": "a"} for image in images]
        files = files_of([encode(image, "BMP") for image in images])
        if kind == "tar":
            return write_tar("a.tar", files)
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        if kind == "table":
            rows = [f"{name},a" for name, _ in files[::2]]
            files.append(("metadata.csv", "\n".join(["image,text", *rows]).encode()))
        for name, content in files:
            (folder / name).write_bytes(content)
            os.utime(folder / name, (1, 1 + (name == newer)))
        return folder

    return write_source


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("kind", "changed", "part"),
    [
        ("folder", None, "data.resize: 'crop' then, 'squash' now"),
        # Not among those that are read for a description, or one of them.
        *[("table", 1, FILES), ("folder", 1, FILES), ("tar", 1, FILES)],
        *[("PIL", 93, SAMPLES), ("arrays", 93, SAMPLES)],
        ("batches", 93, "the images or captions"),
    ],
)
def test_features_of_other_images_are_refused_and_of_the_same_ones_returned(
    kind, changed, part, model, tmp_path, write_source, monkeypatch
):
    def compute(model, newer=None):
        data, folder = write_source(kind, images, newer), tmp_path / "features"
        return compute_features(model, data, folder, tokenizer, verbose=0)

    images = dataset(96)["images"]
    compute(model)
    # A tar that is written again has another date.
    if kind != "tar":
        with monkeypatch.context() as patch:
            patch.setattr(model.image_tower, "features", None)
            compute(model)
    newer = "01.png"
    if changed is None:
        model, newer = frozen_model(resize="squash"), None
    else:
        images[changed] = 0
    with pytest.raises(ValueError, match=f"`features` .*that differ in {part}$"):
        compute(model, newer)


@pytest.mark.any_backend
def test_copied_files_resume_a_run_but_their_features_are_computed_again(
    model, tmp_path, write_source
):
    def compute(source, folder):
        folder = tmp_path / folder
        return compute_features(model, source, folder, tokenizer, verbose=0)

    source, small = write_source("table", dataset(8)["images"], None), compiled_model()
    copy = shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copy)
    for epochs, path in ((1, source), (2, copy)):
        data = kcm.data.image_text_dataset(path, letters_as_tokens, 16, 4)
        for x, fitted in ((data, small), (compute(path, str(epochs)), model)):
            run = tmp_path / fitted.name
            fit = {"batch_size": 4, "epochs": epochs, "resume_from": run}
            fit["callbacks"] = [kcm.callbacks.Checkpoint(run)]
            assert fitted.fit(x, verbose=0, **fit).epoch == [0, 1][:epochs]
    with pytest.raises(ValueError, match=f"`features` .*that differ in {FILES}$"):
        compute(copy, "1")


@pytest.mark.any_backend
def test_the_tokenizer_is_part_of_the_features(model, features, tmp_path):
    def other(texts):
        return tokenizer(texts) + 1

    # The model is saved with it.
    assert model.tokenizer is tokenizer
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"`features` .*tokenizer.*Received: "):
        compute_features(model, dataset(), tmp_path, other, verbose=0)
    model.tokenizer = other
    for use in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=r"`tokenizer` .*Received: features in"):
            use(features, batch_size=5, verbose=0)
    model.tokenizer = tokenizer
    model.fit(features, batch_size=5, verbose=0)


@pytest.mark.any_backend
def test_empty_batches_are_left_out(model, tmp_path):
    expected, data = computed(model, tmp_path / "whole", images=6), dataset(6)
    empty, (first, second) = {name: x[:0] for name, x in data.items()}, split(data, 3)
    batches = [empty, first, empty, second]
    found = compute_features(model, batches, tmp_path / "parts", tokenizer, verbose=0)
    rows = [x.pairs(slice(None))["image_features"] for x in (found, expected)]
    np.testing.assert_allclose(*rows, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`data` must contain at least one image"):
        compute_features(model, [empty], tmp_path / "none", tokenizer, verbose=0)


@pytest.mark.any_backend
def test_an_image_without_a_caption_is_refused(model, tmp_path):
    data = dataset(4, captions=2)
    data["captions"][1] = ()
    with pytest.raises(ValueError, match=r"`data` must have a caption.*Received: 1"):
        compute_features(model, data, tmp_path, tokenizer, verbose=0)


@pytest.mark.any_backend
def test_what_changes_features_is_refused(model, features):
    model.text_encoder.trainable = True
    with pytest.raises(ValueError, match="`text_encoder`"):
        model.fit(features, batch_size=5)


@pytest.mark.one_case
def test_a_masked_model_trains_on_features_without_a_step_of_its_masking(tmp_path):
    weight = keras.optimizers.schedules.PolynomialDecay(0.0, 10, 1.0)
    masking = kcm.ClusterMasking(patch_size=4, embedding_weight=weight)
    model = frozen_model(masking=masking)
    features = computed(model, tmp_path)
    model.compile("adam", **FAST)
    options = {"batch_size": 5, "verbose": 0}
    found = model.fit(features, epochs=2, validation_data=features, **options).history
    loss = model.evaluate(features, return_dict=True, **options)["loss"]
    assert found["val_loss"][-1] == pytest.approx(loss, rel=1e-5)
    assert "mask_ratio" not in found
    assert int(masking.step) == 0
    # Images after features, and the other way around.
    batch = features.pairs(slice(0, 4))
    images = {"images": random_images(4), "token_ids": tokenizer("abcd")}
    assert model.fit(images, batch_size=4, verbose=0).history["mask_ratio"] == [0.5]
    assert int(masking.step) == 1
    assert "mask_ratio" not in model.fit(features, **options).history
    assert "mask_ratio" in model.train_on_batch(images, return_dict=True)
    assert "mask_ratio" not in model.train_on_batch(batch, return_dict=True)
