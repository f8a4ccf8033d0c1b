import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import quality_training
import what_is_left
from quality_data import IMAGES, Data, Recipe
from quality_methods import METHODS, OWN_MASKINGS, STUDIES, Method, cluster

import keras_cluster_mask as kcm

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

RECIPE = Recipe(
    data=str(IMAGES),
    image_size=16,
    patch_size=8,
    batch_size=16,
    steps=4,
    learning_rate=1e-3,
    context_length=6,
    vocabulary_size=600,
)
METHOD = Method(
    lambda patch_size: cluster(patch_size, seed=1),
    over_training={"mask_ratio": (0.5, 0.0)},
)


@pytest.fixture(scope="module")
def data():
    return Data(RECIPE, RECIPE.image_size)


@pytest.fixture(autouse=True)
def two_parts(monkeypatch):
    monkeypatch.setattr(quality_training, "PARTS", 2)
    monkeypatch.setattr(quality_training, "CURVE_IMAGES", 100)


def train(data, folder, recipe=RECIPE):
    return quality_training.train("cluster", METHOD, recipe, data, 1, {}, folder)


def without_times(run):
    return [
        {k: v for k, v in point.items() if k != "seconds"} for point in run["curve"]
    ]


def test_a_run_that_is_cut_off_ends_as_one_that_was_not(data, tmp_path, monkeypatch):
    whole = train(data, tmp_path / "whole")

    save = quality_training._save

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quality_training, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "cut")
    keras.utils.set_random_seed(999)  # As in a process that did other things before.
    resumed = train(data, tmp_path / "cut")
    assert [point["step"] for point in resumed["curve"]] == [2, 4]
    first, second = without_times(resumed)
    assert first == without_times(whole)[0]
    assert second == pytest.approx(without_times(whole)[1], rel=1e-4)
    assert resumed["validation"] == pytest.approx(whole["validation"])

    # A finished run is read, and one of other settings is never taken for it.
    assert train(data, tmp_path / "cut") == json.loads(json.dumps(resumed))
    other = Recipe(**{**vars(RECIPE), "learning_rate": 2e-3})
    with pytest.raises(ValueError, match=r"other settings.*Received: learning_rate"):
        train(data, tmp_path / "cut", other)


def test_a_run_can_be_scored_on_the_test_split_once(data, tmp_path, monkeypatch):
    run = train(data, tmp_path)
    tested = quality_training.test(run, data, tmp_path)
    assert 0 <= tested["test"]["score"] <= 100
    monkeypatch.setattr(data, "scores", None)
    assert quality_training.test(tested, data, tmp_path) is tested


def test_a_finished_model_reads_masked_images(data, tmp_path):
    train(data, tmp_path)
    backbone = quality_training.load_finished(tmp_path).backbone
    images, captions = data.read("validation", 100)

    def embeddings(name):
        masking = quality_training.new_masking(METHODS[name], RECIPE, data)
        model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
        return what_is_left.masked_embeddings(model, images), model

    whole, model = embeddings("none")
    expected = data.embeddings(model, images, captions)["image_embeddings"]
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    masked, _ = embeddings("random")
    assert np.abs(masked - whole).max(axis=1).min() > 1e-3


def test_a_class_token_that_counts_twice_has_twice_the_weight(data, tmp_path):
    train(data, tmp_path)
    backbone = quality_training.load_finished(tmp_path).backbone
    images, _ = data.read("validation", 100)

    def tokens(masking):
        model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
        pixels = keras.ops.convert_to_tensor(images[:4] / 255.0)
        found = model.image_encoder({"images": pixels}, training=True)
        return keras.ops.convert_to_numpy(found)

    whole = tokens(kcm.RandomMasking(0.0))
    twice = tokens(what_is_left.ClassTokenTwice(8))
    assert twice.shape[1] == whole.shape[1] + 1
    np.testing.assert_allclose(twice[:, 0], twice[:, 1], atol=1e-5)
    assert np.abs(twice[:, 1:] - whole).max() > 1e-3


def test_all_methods_keep_half_of_the_patches_on_average():
    for name, method in METHODS.items():
        if ratios := method.over_training.get("mask_ratio"):
            mean = sum(ratios) / len(ratios)
            assert mean == pytest.approx(0.5, abs=1e-3), name
        elif method.masking:
            assert method.masking(6).num_kept(64) == 32, name
    assert {name for study in STUDIES.values() for name in study} <= set(METHODS)


def test_every_masking_comes_back_from_a_checkpoint_as_it_was():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype("float32")
    tokens = rng.normal(size=(3, 1 + 64, 8)).astype("float32")
    for name, method in METHODS.items():
        if method.masking is None:
            continue
        masking = method.masking(4)
        if getattr(masking, "threshold", None) is not None:
            masking.threshold.assign(0.5)
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(masking), custom_objects=OWN_MASKINGS
        )
        again.set_weights(masking.get_weights())
        masking.num_prefix_tokens = again.num_prefix_tokens = 1
        noise = masking.draw(3, 64)
        found, expected = (
            keras.ops.convert_to_numpy(one.select(images, tokens, noise)[0])
            for one in (again, masking)
        )
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_a_folder_without_the_shards_it_takes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`--data`.*Received"):
        Recipe(**{**vars(RECIPE), "data": str(tmp_path)}).splits()
