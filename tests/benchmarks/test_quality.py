import io
import json
import sys
import tarfile
import types
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import quality
from quality_data import IMAGES, splits
from quality_methods import METHODS, STUDIES

import keras_cluster_mask as kcm

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

SMALL = ["--image-size=16", "--patch-size=8", "--batch-size=16", "--steps=8"]
SMALL += ["--context-length=10", "--short-context=4", "--vocabulary-size=600"]
METHOD = "random, rare words, then all"


def run(folder, *options, name=METHOD, costs=None):
    options = quality.arguments([*SMALL, *options])
    data_of = quality.data_by_method(options)
    return quality.train(name, 1, options, data_of, costs or {}, folder)


def test_a_run_that_is_cut_off_ends_as_one_that_was_not(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    assert [point["step"] for point in whole["curve"]] == list(range(1, 9))

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 5:
                raise KeyboardInterrupt

    fit = kcm.ContrastiveModel.fit

    def fit_and_stop(self, *args, callbacks, **options):
        return fit(self, *args, callbacks=[*callbacks, Stop()], **options)

    with monkeypatch.context() as patch:
        patch.setattr(kcm.ContrastiveModel, "fit", fit_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    keras.utils.set_random_seed(999)  # As in a process that did other things before.
    resumed = run(tmp_path / "cut")
    for found, expected in zip(resumed["curve"], whole["curve"], strict=True):
        assert found == pytest.approx(expected)
    assert resumed["validation"] == pytest.approx(whole["validation"])

    # A finished run is read, and one of other settings is never taken for it.
    monkeypatch.setattr(kcm.ContrastiveModel, "fit", None)
    assert run(tmp_path / "cut") == json.loads(json.dumps(resumed))
    with pytest.raises(ValueError, match=r"same settings.*Received.*0\.002"):
        run(tmp_path / "cut", "--learning-rate=0.002")


def test_a_finished_run_is_scored_on_the_test_split_without_more_training(tmp_path):
    finished = run(tmp_path)
    assert "test" not in finished
    tested = run(tmp_path, "--test")
    assert 0 <= tested["test"]["score"] <= 100
    assert tested["curve"] == finished["curve"]
    assert tested["validation"] == finished["validation"]


def test_classes_are_judged_by_zero_shot_accuracy_and_a_linear_probe(tmp_path):
    write_colors(tmp_path / "data")
    options = [f"--data={tmp_path / 'data'}", "--learning-rate=0.002", "--steps=64"]
    found = run(tmp_path / "runs", *options, name="random")
    assert set(found["validation"]) == {"score", "linear probe"}
    # Red and blue squares: chance is a half.
    assert found["validation"]["linear probe"] > 90
    assert found["validation"]["score"] > 90


def write_colors(folder):
    folder.mkdir()
    for split, count in {"train": 64, "validation": 32, "test": 32}.items():
        with tarfile.open(folder / f"{split}-00000.tar", "w") as shard:
            for number in range(count):
                color = ("red", "blue")[number % 2]
                image = io.BytesIO()
                Image.new("RGB", (16, 16), color).save(image, "PNG")
                for end, content in {
                    "png": image.getvalue(),
                    "txt": f"a {color} square".encode(),
                }.items():
                    entry = tarfile.TarInfo(f"{number:04}.{end}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))


def test_a_masking_with_a_teacher_trains(tmp_path):
    trained = run(tmp_path, name="attentive")
    assert [point["step"] for point in trained["curve"]] == list(range(1, 9))
    assert METHODS["attentive"].masking is None


def test_methods_keep_half_of_the_patches_or_say_that_they_do_not():
    for name, method in METHODS.items():
        if method.masking:
            expected = 16 if "quarter" in name else 32
            assert method.masking(6).num_kept(64) == expected, name
        if method.token_masking:
            assert method.token_masking(8 / 24).num_kept(24) == 8, name
    assert {name for study in STUDIES.values() for name in study} <= set(METHODS)


def test_methods_that_cut_texts_train_on_short_ones_and_are_judged_by_whole_ones(
    monkeypatch,
):
    # NLTK's tagger is a file of its own, to be downloaded.
    nltk = types.SimpleNamespace(pos_tag=lambda words: [(word, "NN") for word in words])
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    options = quality.arguments(SMALL)
    data = quality.data_by_method(options)(METHODS["random"])
    for name, method in METHODS.items():
        length = 4 if method.text_masking else 10
        batch = next(iter(data.training(1, method, whole_texts=False)))
        assert np.shape(batch["token_ids"]) == (16, length), name
    batch = next(iter(data.training(1, METHODS[METHOD], whole_texts=True)))
    assert np.shape(batch["token_ids"]) == (16, 10)
    assert data.tokenizer.context_length == 10


def test_a_folder_without_the_shards_it_takes_is_refused(tmp_path):
    assert len(splits(IMAGES)["validation"]) == 1
    with pytest.raises(ValueError, match=r"`--data`.*Received"):
        splits(tmp_path)
