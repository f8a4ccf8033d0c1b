import json

import numpy as np
import pytest
import quality
from PIL import Image
from quality_data import IMAGES, loss_at_best_temperature
from quality_methods import CHANGES, PATCHES, STUDIES, method_of
from scipy.special import log_softmax
from sklearn.preprocessing import normalize

import keras_cluster_mask as kcm

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

SMALL = ["--image-size=16", "--patch-size=8", "--batch-size=16", "--steps=8"]
SMALL += ["--context-length=10", "--short-context=4", "--vocabulary-size=600"]
METHOD = "random, rare words, whole texts last"


@pytest.fixture(autouse=True)
def few(few_images, monkeypatch):
    """Few images in place of all, where no others are named."""
    monkeypatch.setattr(quality, "IMAGES", few_images / "images")


def trained(folder, *options, name=METHOD):
    options = quality.arguments([*SMALL, *options])
    data_of = quality.data_by_method(options)
    return quality.train(name, 1, options, data_of, {}, folder)


def test_a_finished_run_is_read_and_never_taken_for_one_of_other_settings(
    tmp_path, monkeypatch
):
    whole = trained(tmp_path)
    assert [point["step"] for point in whole["curve"]] == list(range(1, 9))
    whole = json.loads(json.dumps(whole))
    monkeypatch.setattr(kcm.ContrastiveModel, "fit", None)
    assert trained(tmp_path) == whole
    tested = trained(tmp_path, "--test")
    assert 0 <= tested.pop("test")["score"] <= 100
    assert tested == whole
    with pytest.raises(ValueError, match=r"same settings.*Received.*0\.002"):
        trained(tmp_path, "--learning-rate=0.002")


def test_classes_are_judged_by_zero_shot_accuracy_and_a_linear_probe(
    tmp_path, write_tar, encode
):
    for split, count in {"train": 64, "validation": 32, "test": 32}.items():
        files = []
        for key in range(count):
            color = ("red", "blue")[key % 2]
            image = encode(Image.new("RGB", (16, 16), color))
            caption = f"a {color} square".encode()
            files += [(f"{key:04}.png", image), (f"{key:04}.txt", caption)]
        write_tar(f"{split}-00000.tar", files)
    options = [f"--data={tmp_path}", "--learning-rate=0.002", "--steps=64"]
    found = trained(tmp_path / "runs", *options, name="random")
    assert set(found["validation"]) == {"score", "linear probe", "loss"}
    # Red and blue squares: chance is a half.
    assert found["validation"]["linear probe"] > 90
    assert found["validation"]["score"] > 90


def test_stages_of_a_method_have_its_maskings(tmp_path, monkeypatch):
    maskings = []
    fit = kcm.ContrastiveModel.fit

    def noted(self, *args, **options):
        maskings.append(sum(x.mask_ratio > 0 for x in self.maskings))
        return fit(self, *args, **options)

    monkeypatch.setattr(kcm.ContrastiveModel, "fit", noted)
    found = trained(tmp_path, name="threshold, whole images last")
    assert maskings == [1, 0]
    assert [point["step"] for point in found["curve"]] == list(range(1, 9))


def test_methods_keep_the_share_of_the_patches_that_they_say():
    kept = {"threshold": 44, "threshold with fill-in": 44, "grid": 16}
    for name, method in PATCHES.items():
        if method.masking:
            expected = kept.get(name, 32)
            assert method.new_masking(6).num_kept(64) == expected, name
    quarter = method_of("cluster, ratio 0.75").new_masking(6)
    assert quarter.num_kept(64) == 16
    assert all(method_of(name) for study in STUDIES.values() for name in study)


@pytest.mark.parametrize(
    "name",
    [
        "random, some words",
        "none, ratio 0.75",
        "grid, ratio 0.25",
        "random, ratio 0.25, ratio 0.75",
        "random, 12 tokens",
        "random, whole texts last",
    ],
)
def test_a_method_whose_changes_have_no_effect_is_refused(name):
    with pytest.raises(ValueError, match="Received"):
        method_of(name)


def test_methods_that_cut_texts_train_on_short_ones_and_are_judged_by_whole_ones():
    data = quality.data_by_method(quality.arguments(SMALL))(method_of("random"))
    for name in sorted(set(CHANGES) - {"12 tokens", "whole texts last"}):
        method = method_of(f"random, {name}")
        length = 4 if method.text_masking else 10
        batch = next(iter(data.training(1, method, whole_texts=False)))
        assert np.shape(batch["token_ids"]) == (16, length), name
    batch = next(iter(data.training(1, method_of(METHOD), whole_texts=True)))
    assert np.shape(batch["token_ids"]) == (16, 10)
    assert data.tokenizer.context_length == 10


def test_the_loss_at_the_best_temperature_is_that_of_a_grid_in_numpy():
    rng, batches = np.random.default_rng(0), []
    for _ in range(2):
        images = rng.normal(size=(40, 8)).astype("float32")
        texts = images + rng.normal(size=(40, 8)).astype("float32")
        batches.append((normalize(images), normalize(texts), np.arange(40) // 2))

    def loss(scale):
        losses = []
        for images, texts, labels in batches:
            same = labels[:, None] == labels
            target = same / same.sum(axis=1, keepdims=True)
            logits = scale * images @ texts.T
            for each in (logits, logits.T):
                found = log_softmax(each, axis=1)
                losses.append(-(target * found).sum(axis=1).mean())
        return np.mean(losses)

    best = min(loss(scale) for scale in np.geomspace(1, 100, 200))
    assert loss_at_best_temperature(batches) == pytest.approx(best, abs=1e-3)


def test_the_command_reports_the_runs_of_all_processes(run, tmp_path, monkeypatch):
    methods = ["none", "random", "none, equal time"]
    command = [*SMALL, f"--results={tmp_path}", "--seeds=1"]
    folder = tmp_path / IMAGES.name

    def table(*options):
        run(quality, *command, *options)
        return json.loads((folder / "chosen.json").read_text())["rows"]

    trained(folder, name="none")
    # Another process has taken a run.
    with quality.claim(quality.place_of("random", 1, folder)):
        assert [row["method"] for row in table("--methods", *methods[:2])] == ["none"]
    milliseconds = {"none": 1.0, "random": 0.5}
    monkeypatch.setattr(
        quality,
        "interleaved",
        lambda steps, *_, **__: {key: [milliseconds[key[0]]] for key in steps},
    )
    with pytest.raises(ValueError, match="--costs"):
        table("--steps=16", "--methods", *methods)
    command.append("--steps=16")
    folder.rename(tmp_path / "of-8-steps")
    rows = table("--costs", "--methods", *methods)
    assert [row["method"] for row in rows] == methods
    assert [row["steps"] for row in rows] == [16, 16, 8]
    assert [row["training time / random"] for row in rows] == [2.0, 1.0, 1.0]
    assert rows[1]["validation loss - random's"] == "0.000"


def test_a_run_may_start_from_the_weights_of_another(tmp_path):
    first = trained(tmp_path / "first", name="none")
    place = quality.place_of("none", 1, tmp_path / "first")
    options = [f"--start-from={place}", "--learning-rate=1e-12"]
    second = trained(tmp_path / "second", *options, name="cluster")
    assert second["validation"] == pytest.approx(first["validation"])
    assert second["setting"]["start_from"]["method"] == "none"
    with pytest.raises(ValueError, match=r"--start-from.*vocabulary_size.*Received"):
        trained(tmp_path / "third", *options, "--vocabulary-size=601")
