"""Projections on features and tuning, with tiny encoders."""

import json

import connect_encoders
import keras_hub
import probe_encoders
import pytest

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

SIZES = dict(num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "no", *map(str, range(40))]


@pytest.fixture
def folders(tmp_path, write_pairs):
    shape = (24, 24, 3)
    keras_hub.models.DINOV2Backbone(
        patch_size=8, image_shape=shape, position_embedding_shape=shape, **SIZES
    ).save_to_preset(tmp_path / "dinov2_small")
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
        --batch-size=10""".split()
    heads = ["--head-batch-size=20", "--head-epochs=2", "--test"]

    def measure(program, name, *arguments):
        run(program, *arguments, *options)
        return json.loads((folders / "results" / f"{name}.json").read_text())

    monkeypatch.setattr(connect_encoders, "SHORT_LENGTH", 9)
    stages = ["features", "heads", *heads, "--seeds", "1", "2"]
    measure(connect_encoders, "connect_encoders", *stages)
    methods = ["random", "none", "random 0.6, LoRA", "cluster, short texts"]
    methods += ["random, last blocks", "random, whole images last", "none, rate 1e-5"]
    tune = ["tune", *heads, "--equal-time", "--seeds=1", "--methods", *methods]
    runs = measure(connect_encoders, "connect_encoders", *tune, "--costs")["runs"]
    assert {*runs} >= {"head-mlp-2", "tune-none-1-equal_time-1"}
    assert all(0 <= run["test"]["mean"] <= 100 for run in runs.values())
    assert runs["tune-random-1-equal_time-1"]["steps"] == 4
    tuned = {run["method"]: run for run in runs.values() if "method" in run}
    assert {*tuned} == {*methods}
    assert tuned["none, rate 1e-5"]["losses"] != tuned["none"]["losses"]
    trained = {name: run["trained weights"] for name, run in tuned.items()}
    assert trained["random 0.6, LoRA"] < trained["random, last blocks"]
    assert trained["random, last blocks"] < trained["random"]
    losses = ["losses", "--seeds=1", "--methods", "none", "random 0.9"]
    none, masked = measure(probe_encoders, "masked_losses", *losses)["rows"]
    assert none["loss"] != masked["loss"]
    transfer = ["transfer", "--seeds=1", f"--classes={folders}/classes", "--count=10"]
    rows = measure(probe_encoders, "transfer", *transfer)["rows"]
    assert len(rows) == 1 + len(methods)
    monkeypatch.setattr(connect_encoders, "new_model", None)
    again = measure(connect_encoders, "connect_encoders", "heads", *tune)
    assert again["runs"] == runs
    # The others consist of steps of these.
    assert {*again["time of a step"]} == {*methods[:5]}
