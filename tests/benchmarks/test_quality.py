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
from quality_data import IMAGES, splits, with_square
from quality_methods import CHANGES, PATCHES, STUDIES, Method, method_of
from quality_models import new_backbone
from quality_shift import Shift, loss_at_best_temperature

import keras_cluster_mask as kcm

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

SMALL = ["--image-size=16", "--patch-size=8", "--batch-size=16", "--steps=8"]
SMALL += ["--context-length=10", "--short-context=4", "--vocabulary-size=600"]
METHOD = "random, rare words, whole texts last"


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
    assert set(found["validation"]) == {"score", "linear probe", "covered", "loss"}
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


def test_methods_keep_the_share_of_the_patches_that_they_say():
    encoder = kcm.models.clip_backbone("tiny", image_size=48, patch_size=6)
    encoder = encoder.vision_encoder
    kept = {"threshold": 44, "threshold with fill-in": 44, "grid": 16}
    for name, method in PATCHES.items():
        if method.masking:
            expected = kept.get(name, 32)
            assert method.new_masking(6, encoder, 8).num_kept(64) == expected, name
    quarter = method_of("cluster, ratio 0.75").new_masking(6, encoder, 8)
    assert quarter.num_kept(64) == 16
    masking = method_of("random, tokens at their positions").token_masking(8 / 24)
    assert masking.num_kept(24) == 8
    assert all(method_of(name) for study in STUDIES.values() for name in study)
    for name in (
        "random, some words",
        "none, ratio 0.75",
        "grid, ratio 0.25",
        "random, ratio 0.25, ratio 0.75",
        "random, 12 tokens",
        "random, whole texts last",
        "random, tokens at their positions, whole images last",
    ):
        with pytest.raises(ValueError, match="Received"):
            method_of(name)


def test_the_last_part_may_read_whole_images(tmp_path, monkeypatch):
    maskings = []
    fit = kcm.ContrastiveModel.fit

    def noted(self, *args, **options):
        maskings.append(self.maskings)
        return fit(self, *args, **options)

    monkeypatch.setattr(kcm.ContrastiveModel, "fit", noted)
    trained = run(tmp_path, name="cluster, whole images last")
    assert [len(each) for each in maskings] == [1, 0]
    assert [point["step"] for point in trained["curve"]] == list(range(1, 9))


def losses(ratio, seed=1):
    """Of a fresh model, with so many patches left out; `None`: no masking."""
    masking = None if ratio is None else lambda *args: kcm.RandomMasking(ratio)
    options = quality.arguments(SMALL)
    data = quality.data_by_method(options)(method_of("random"))
    model = quality.new_model(method_of("random"), options, data, seed, 8)
    shift = Shift(data, Method(masking), model.masking, 8, 8)
    shift.set_model(model)
    return shift.measure()


def test_masked_and_whole_images_have_one_loss_if_nothing_is_left_out():
    assert set(losses(None)) == {name for name in Shift.NAMES if "whole" in name}
    found = losses(0.0)
    assert set(found) == set(Shift.NAMES)
    for split in ("training", "validation"):
        loss = found[f"masked {split} loss"]
        assert loss == pytest.approx(found[f"whole {split} loss"], rel=1e-4)
        assert found[f"masked {split} cosine"] == pytest.approx(1.0, abs=1e-4)
    half = losses(0.5)
    assert half == losses(0.5)
    assert half["masked training cosine"] < 0.999


def test_the_best_temperature_is_found_whatever_the_model_has():
    """Against a grid of temperatures in NumPy."""
    options = quality.arguments(SMALL)
    data = quality.data_by_method(options)(method_of("none"))
    pairs = data.pairs("validation")[:2]
    found = []
    for temperature in (0.02, 0.5):
        keras.utils.set_random_seed(1)
        backbone = kcm.models.clip_backbone("tiny", 16, 600, 10, patch_size=8)
        model = kcm.ContrastiveModel.from_backbone(
            backbone, initial_temperature=temperature
        )
        found.append(loss_at_best_temperature(model, pairs))
    assert found[0] == pytest.approx(found[1], rel=1e-4)

    def loss(scale):
        losses = []
        for batch in pairs:
            embeddings = model(batch, training=False)
            images, texts = (
                keras.ops.convert_to_numpy(keras.ops.stop_gradient(embeddings[key]))
                for key in ("image_embeddings", "text_embeddings")
            )
            ids = np.asarray(batch["token_ids"])
            same = (ids[:, None] == ids[None]).all(-1)
            target = same / same.sum(axis=1, keepdims=True)
            logits = scale * images @ texts.T
            for each in (logits, logits.T):
                each = each - each.max(axis=1, keepdims=True)
                log_softmax = each - np.log(np.exp(each).sum(axis=1, keepdims=True))
                losses.append(-(target * log_softmax).sum(axis=1).mean())
        return np.mean(losses)

    best = min(loss(scale) for scale in np.geomspace(1, 100, 200))
    assert found[1] == pytest.approx(best, abs=1e-3)


def test_a_threshold_is_known_where_the_last_part_masks_nothing(tmp_path):
    trained = run(tmp_path, name="threshold, whole images last")
    assert np.isfinite(trained["curve"][-1]["masked validation loss"])


def test_a_size_may_be_a_width_and_a_number_of_layers(capsys):
    data = types.SimpleNamespace(
        image_size=16, tokenizer=types.SimpleNamespace(vocabulary_size=600)
    )
    tiny, same, larger = (
        new_backbone(quality.arguments([*SMALL, f"--size={size}"]), data)
        for size in ("tiny", "96x3", "192x6")
    )
    assert [w.shape for w in same.weights] == [w.shape for w in tiny.weights]
    assert larger.vision_encoder.hidden_dim == 192
    assert larger.vision_encoder.num_layers == 6
    assert larger.text_encoder.num_layers == 2
    with pytest.raises(SystemExit):
        quality.arguments(["--size=huge"])
    assert "Received: huge" in capsys.readouterr().err


def test_the_command_reports_the_runs_of_all_processes(tmp_path, monkeypatch):
    methods = ["none", "random"]
    command = ["quality.py", *SMALL, f"--results={tmp_path}", "--seeds=1", "--methods"]
    run(tmp_path / IMAGES.name, name="none")
    monkeypatch.setattr(sys, "argv", [*command, *methods])
    taken = quality.place_of("random", 1, tmp_path / IMAGES.name)
    with quality.claim(taken):
        quality.main()
    table = json.loads((tmp_path / IMAGES.name / "chosen.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["none"]
    monkeypatch.setattr(sys, "argv", [*command, *methods, "--costs"])
    monkeypatch.setattr(
        quality, "interleaved", lambda steps, *_, **__: {key: [0.5] for key in steps}
    )
    quality.main()
    table = json.loads((tmp_path / IMAGES.name / "chosen.json").read_text())
    assert [row["method"] for row in table["rows"]] == methods
    assert [row["training time / random"] for row in table["rows"]] == [1.0, 1.0]
    none, random = table["rows"]
    assert "whole training loss" in none
    assert "masked training loss" not in none
    assert "masked training cosine" in random
    plots = {file.name for file in (tmp_path / IMAGES.name).glob("*.png")}
    expected = ("learning-curves", "losses", "generalization", "cost-quality")
    assert plots == {f"chosen-{name}.png" for name in expected}


def test_halves_share_no_sample(tmp_path):
    write_colors(tmp_path / "data")
    seen = []
    for half in (0, 1):
        options = [f"--data={tmp_path / 'data'}", f"--half={half}", *SMALL]
        method = method_of("random")
        data = quality.data_by_method(quality.arguments(options))(method)
        batches = data.training(1, method, whole_texts=False)
        # Samples of even numbers are red, others are blue.
        (color,) = {tuple(image[0, 0] > 100) for image in next(iter(batches))["images"]}
        pairs = data.pairs("training")
        assert sum(len(batch["images"]) for batch in pairs) == 32
        assert {tuple(x[0, 0] > 100) for x in pairs[0]["images"]} == {color}
        seen.append(color)
    assert seen[0] != seen[1]


def test_a_run_may_start_from_the_weights_of_another(tmp_path):
    first = run(tmp_path / "first", name="none")
    place = quality.place_of("none", 1, tmp_path / "first")
    options = [f"--start-from={place}", "--learning-rate=1e-12"]
    second = run(tmp_path / "second", *options, name="cluster")
    assert second["validation"] == pytest.approx(first["validation"])
    assert second["setting"]["start_from"]["method"] == "none"
    with pytest.raises(ValueError, match=r"--start-from.*vocabulary_size.*Received"):
        run(tmp_path / "third", *options, "--vocabulary-size=601")


def test_a_square_hides_a_quarter_of_each_image():
    images = np.zeros((3, 16, 16, 3), "uint8")
    covered = with_square({"images": images, "captions": ["a"] * 3})
    assert np.all((covered["images"] == 128).sum(axis=(1, 2, 3)) == 8 * 8 * 3)
    assert not images.any()
    assert covered["captions"] == ["a"] * 3


def test_a_run_that_one_process_has_taken_is_no_other_process_s(tmp_path):
    with quality.claim(tmp_path / "run") as mine:
        assert mine
        with quality.claim(tmp_path / "run") as also_mine:
            assert not also_mine
    with quality.claim(tmp_path / "run") as mine:
        assert mine


def test_methods_that_cut_texts_train_on_short_ones_and_are_judged_by_whole_ones(
    monkeypatch,
):
    # NLTK's tagger is a file of its own, to be downloaded.
    nltk = types.SimpleNamespace(pos_tag=lambda words: [(word, "NN") for word in words])
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    options = quality.arguments(SMALL)
    data = quality.data_by_method(options)(method_of("random"))
    for name in sorted(set(CHANGES) - {"12 tokens", "whole texts last"}):
        method = method_of(f"random, {name}")
        length = 4 if method.text_masking else 10
        batch = next(iter(data.training(1, method, whole_texts=False)))
        assert np.shape(batch["token_ids"]) == (16, length), name
    batch = next(iter(data.training(1, method_of(METHOD), whole_texts=True)))
    assert np.shape(batch["token_ids"]) == (16, 10)
    assert data.tokenizer.context_length == 10


def test_a_folder_without_the_shards_it_takes_is_refused(tmp_path):
    assert len(splits(IMAGES)["validation"]) == 1
    with pytest.raises(ValueError, match=r"`--data`.*Received"):
        splits(tmp_path)
