"""Projections on features and tuning, with tiny encoders."""

import json

import connect_encoders
import keras_hub
import levers
import probe_encoders
import pytest
import torch
import tuning_cores
import tuning_time

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

SIZES = dict(num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=32)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "no", *map(str, range(40))]


@pytest.fixture
def folders(tmp_path, write_pairs):
    shapes = dict(image_shape=(24, 24, 3), position_embedding_shape=(40, 40, 3))
    keras_hub.models.DINOV2Backbone(patch_size=8, **shapes, **SIZES).save_to_preset(
        tmp_path / "dinov2_small"
    )
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=WORDS)
    pack = keras_hub.models.BertTextEmbedderPreprocessor(tokenizer, sequence_length=12)
    bert = keras_hub.models.BertBackbone(len(WORDS), max_sequence_length=12, **SIZES)
    text = keras_hub.models.BertTextEmbedder(bert, pack)
    text.save_to_preset(tmp_path / "all_minilm_l6_v2")
    for split, count in {"train": 40, "validation": 20, "test": 20}.items():
        write_pairs(f"{split}-0.tar", 0, count)
    # Each class twice.
    (tmp_path / "classes").mkdir()
    for name in ("train-0", "train-1", "test-0"):
        write_pairs(f"classes/{name}.tar", 0, 5)
    return tmp_path


def test_all_stages_run_and_a_second_run_changes_nothing(folders, run, monkeypatch):
    options = f"""--encoders={folders} --data={folders} --results={folders}/results
        --features={folders}/features --caption-key=txt --image-size=24
        --dtype=float32""".split()
    heads = ["--head-batch-size=20", "--head-epochs=2", "--test"]

    def measure(program, name, *arguments):
        run(program, *arguments, *options)
        return json.loads((folders / "results" / f"{name}.json").read_text())

    linear = ["linear", "mlp", "linear images=1+2", "mlp images=1 texts=1+2"]
    linear += ["mlp photos=20"]
    stages = ["features", "heads", *heads, "--seeds", "1", "2", "--heads", *linear]
    measure(connect_encoders, "connect_encoders", *stages)
    written = (folders / "results" / "features.json").read_text()
    features = json.loads(written)["splits"]
    changes = [" ratio=0.6 lora=2", " last=1", " rate=1e-2", " depth=0.5 warmup=0.5"]
    changes += ["", " images=1 texts=1+2 text=2", " micro=5 crop=0.9"]
    names = ["none batch=10", *(f"random batch=10{change}" for change in changes)]
    tune = ["tune", *heads, "--equal-time", "--seeds=1", "--runs", *names]
    runs = measure(connect_encoders, "connect_encoders", *tune, "--costs")["runs"]
    assert {*runs} >= {"head-mlp-2", "tune-none_batch=10-equal_time-1"}
    assert all(0 <= run["test"]["mean"] <= 100 for run in runs.values())
    tuned = {name: run for name, run in runs.items() if "run" in run}
    assert len(tuned) == len(names)
    assert tuned["tune-random_batch=10-equal_time-1"]["steps"] == 4
    trained = {name: run["trained weights"] for name, run in tuned.items()}
    of_lora, of_last = (
        value for name, value in trained.items() if "lora" in name or "last" in name
    )
    assert of_last < trained["tune-random_batch=10-equal_time-1"]
    assert of_lora < trained["tune-random_batch=10-equal_time-1"]
    assert len({run["losses"][-1] for run in tuned.values()}) == len(names)
    losses = ["losses", "--seeds=1", "--runs", "none", "random ratio=0.9"]
    none, masked = measure(probe_encoders, "masked_losses", *losses)["rows"]
    assert none["loss"] != masked["loss"]
    transfer = ["transfer", "--seeds=1", f"--classes={folders}/classes", "--count=10"]
    rows = measure(probe_encoders, "transfer", *transfer)["rows"]
    assert len(rows) == 1 + len(names)
    of = ["--equal-time", "--seeds=1", "--runs", "random batch=10"]
    shares = [*of, f"--classes={folders}/classes", "--shares", "0", "1"]
    before, after = measure(probe_encoders, "averages", "averages", *shares)["rows"]
    head, best = runs["head-mlp-1"], tuned["tune-random_batch=10-equal_time-1"]
    assert before["mean"] == pytest.approx(head["validation"]["mean"])
    assert after["mean"] == pytest.approx(best["validation"]["mean"])
    rows = measure(probe_encoders, "sizes", "sizes", *of, "--sizes", "24", "32")["rows"]
    assert rows[0]["loss"] == pytest.approx(after["loss"], abs=1e-4)
    assert rows[1]["loss"] != rows[0]["loss"]
    timed = ["--rounds=1", "--runs", "none batch=10", "random batch=10"]
    rows = measure(tuning_time, "tuning_time", *timed)["rows"]
    torch.backends.cuda.enable_flash_sdp(True)
    assert len(rows) == 6
    parts = {"data", "images, both", "texts, both", "optimizer", "step"}
    assert all(row[part] > 0 for row in rows for part in parts)
    monkeypatch.setattr(connect_encoders, "new_model", None)
    again = measure(connect_encoders, "connect_encoders", "heads", *tune)
    assert again["runs"] == runs
    assert again["rows"][0]["minutes"] == features["train"]["processor minutes"]
    assert {*again["seconds of a step"]} == {"none", "random", "random ratio=0.6"}


def test_a_tuning_step_is_timed_in_two_processes(folders, run, monkeypatch):
    monkeypatch.setattr(tuning_cores, "SETTINGS", {"two": (2, 1)})
    options = f"""--encoders={folders} --data={folders} --results={folders}/results
        --caption-key=txt --image-size=24 --dtype=float32 --rounds=1 --steps=2
        --runs""".split()
    run(tuning_cores, *options, "random batch=10 depth=0.5")
    results = json.loads((folders / "results" / "tuning_cores.json").read_text())
    (row,) = results["rows"]
    assert row["seconds"] > 0


def test_each_lever_trains_for_its_time_and_resumes(folders, run, monkeypatch):
    options = f"""--encoders={folders} --data={folders} --results={folders}/results
        --features={folders}/features --caption-key=txt --image-size=24
        --dtype=float32 --seeds=1""".split()
    heads = ["--head-batch-size=20", "--head-epochs=2", "--heads", "mlp"]
    run(connect_encoders, "features", "heads", *heads, *options)
    changes = ["captions=2", "words=1", "drop=0.2", "memory=2", "alike=5", "whole=0.5"]
    changes += ["start=none", "start=caption", "start=half"]
    names = ["none batch=10", "random batch=10"]
    names += [f"random batch=10 {change}" for change in changes]
    monkeypatch.setattr(levers, "BASE", levers.Lever("random", batch=10))
    run(levers, "--costs", *options, "--runs", *names)
    costs = folders / "results" / "lever_costs.json"
    measured = json.loads(costs.read_text())
    assert measured["costs"]["random batch=10"] == 1
    measured["costs"] = dict.fromkeys(measured["costs"], 1)
    costs.write_text(json.dumps(measured))
    monkeypatch.setattr(levers, "SAVE_EVERY", 2)
    # Interrupted after the first steps were saved.
    save, step = levers.Step.save, levers.Step

    def interrupted(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    train = ["--steps=6", *options, "--runs", *names]
    monkeypatch.setattr(step, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(levers, *train)
    monkeypatch.setattr(step, "save", save)
    load, loaded = step.load, []

    def spied(*arguments):
        done, losses = load(*arguments)
        loaded.append((done, len(losses)))
        return done, losses

    monkeypatch.setattr(step, "load", spied)
    run(levers, *train)
    assert loaded == [(2, 1)]
    torch.backends.cuda.enable_flash_sdp(True)
    found = json.loads((folders / "results" / "levers.json").read_text())["runs"]
    assert len(found) == len(names)
    assert {len(x["losses"]) for x in found.values()} == {3}
    assert len({x["losses"][-1] for x in found.values()}) == len(names)
