"""What is reported of a step: methods without enough memory, and utilization."""

import json
import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import reporting
import step_time
from clip_steps import Setting
from flops import PEAKS, peak_tflops, training_flops, utilization

pytestmark = pytest.mark.slow
BACKEND = keras.backend.backend()


def raise_out_of_memory():
    if BACKEND == "torch":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory.")
    if BACKEND == "jax":
        import jax

        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    import tensorflow as tf

    raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")


@pytest.fixture
def made(monkeypatch):
    """Replaces the steps: that on whole images fails at more than 64 pairs."""
    made = []

    def training_steps(names, setting):
        made.append((setting.batch_size, tuple(names)))

        def step(name):
            if name == "none" and setting.batch_size > 64:
                raise_out_of_memory()

        return {name: lambda name=name: step(name) for name in names}

    monkeypatch.setattr(step_time, "training_steps", training_steps)
    return made


def test_a_method_without_enough_memory_is_reported_and_the_others_are_timed(
    made, monkeypatch, tmp_path, capsys
):
    arguments = ["--batch-size", "64", "128", "--methods", "random", "none"]
    arguments += ["--rounds", "2", "--name", "x", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *arguments])
    step_time.main()
    written = json.loads((tmp_path / "step_time-x.json").read_text())
    found = [(row["batch"], row["method"], row["step (ms)"]) for row in written["rows"]]
    assert found[2:] == [(128, "random", found[2][2]), (128, "none", "out of memory")]
    assert all(isinstance(step, int) for *_, step in found[:3])
    assert "images/s" not in written["rows"][3]
    # Ratios only to what was timed.
    assert "/ none" in written["rows"][0]
    assert "/ none" not in written["rows"][2]
    assert {k: [*v] for k, v in written["seconds"].items()} == {
        "64": ["random", "none"],
        "128": ["random"],
    }
    assert str(tmp_path) not in json.dumps(written)
    assert "batch 64, 128" in capsys.readouterr().out


def test_after_a_failure_the_others_get_models_of_their_own(made):
    methods = ["cluster", "none", "resized"]
    steps = step_time.steps_that_fit(methods, Setting(batch_size=128))
    assert [*steps] == ["cluster", "resized"]
    # Most tokens first, so that nothing but the failure is done again.
    assert made == [
        (128, ("none", "resized", "cluster")),
        (128, ("resized", "cluster")),
    ]


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def fail():
        raise (RuntimeError if BACKEND == "torch" else ValueError)("no device")

    monkeypatch.setattr(step_time, "training_steps", lambda *args: {"none": fail})
    with pytest.raises((RuntimeError, ValueError), match="no device"):
        step_time.steps_that_fit(["none"], Setting())


@pytest.mark.any_backend
def test_utilization_is_the_arithmetic_over_the_time_and_the_peak():
    # Half of 989 TFLOP/s, for two seconds.
    assert utilization(989e12, 2.0, 989) == 0.5
    # open_clip publishes 41.09 GFLOP for the forward pass of a pair.
    seconds = {"none": [0.1, 0.1, 0.3]}
    setting = Setting(batch_size=256)
    row = step_time.table_row("none", setting, seconds, {"none": None}, 989.0)
    expected = 3 * 41.09e9 * 256 / 0.1 / 989e12
    assert row["utilization"] == f"{expected:.1%}" == "31.9%"
    assert row["images/s"] == "2560"
    assert training_flops("vit_b_16") == pytest.approx(3 * 41.09e9, rel=1e-3)


@pytest.mark.any_backend
def test_a_card_that_is_not_known_has_no_utilization():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    # The same chip, slower, and a name that contains another.
    for name in ("NVIDIA H100 PCIe", "NVIDIA L40", None):
        assert peak_tflops(name) is None
    found = {"none": [1.0]}
    row = step_time.table_row("none", Setting(), found, {"none": 1.5}, None)
    assert "utilization" not in row
    assert row["memory of a step (GiB)"] == "1.50"


@pytest.mark.any_backend
def test_files_are_named_after_cards(monkeypatch):
    names = {}
    for name in (None, *PEAKS):
        monkeypatch.setattr(reporting, "_accelerator", lambda name=name: name)
        names[name] = reporting.card()
    assert names[None] is None
    assert names["NVIDIA H100 80GB HBM3"] == "h100-80gb-hbm3"
    assert names["NVIDIA GeForce RTX 4090"] == "rtx-4090"
    assert len({*names.values()}) == len(names)
