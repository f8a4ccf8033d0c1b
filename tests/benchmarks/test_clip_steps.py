import json
import os
import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import step_memory
import step_time
from clip_steps import MASKINGS, OPEN_CLIP, Setting, step_methods, training_steps
from reporting import card, machine

pytestmark = pytest.mark.slow

TINY = Setting(size="tiny", image_size=32, batch_size=4)
ARGUMENTS = ["--size", "tiny", "--image-size", "32", "--batch-size", "4"]
BACKEND = keras.backend.backend()
NAME = "-".join(filter(None, (BACKEND, card())))


def run(benchmark, monkeypatch, *arguments):
    # As on the command line: `step_memory` starts itself again with these arguments.
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *ARGUMENTS, *arguments])
    benchmark.main()


@pytest.mark.any_backend
def test_masked_methods_read_half_of_the_tokens_or_what_beta_says():
    setting = Setting()
    found = {name: setting.image_tokens(name) for name in (*MASKINGS, *OPEN_CLIP)}
    assert found == {
        "none": 196,
        "random": 98,
        "cluster": 98,
        "threshold, beta 0.5": 98,
        "threshold, beta 0.3": 137,
        "resized": 100,
        "random, two views": 196,
        "open_clip, none": 196,
        "open_clip, patch dropout 0.5": 98,
    }
    assert setting.side("resized") == 160


@pytest.mark.any_backend
def test_arithmetic_follows_the_tokens():
    setting = Setting()
    whole = setting.arithmetic("none")
    assert setting.arithmetic("open_clip, none") == whole
    for name in ("random", "cluster", "open_clip, patch dropout 0.5", "resized"):
        assert setting.arithmetic(name) / whole == pytest.approx(0.57, abs=0.01)
    assert setting.arithmetic("threshold, beta 0.3") / whole > 0.7


def test_step_time_publishes_every_method(monkeypatch, tmp_path, capsys):
    methods = ("--methods", "none", "threshold, beta 0.3", "resized")
    run(step_time, monkeypatch, *methods, "--rounds", "2", "--results", str(tmp_path))
    written = json.loads((tmp_path / f"step_time-{NAME}.json").read_text())
    rows = {row["method"]: row for row in written["rows"]}
    assert list(rows) == list(methods[1:])
    assert rows["none"]["/ none"] == rows["none"]["arithmetic / none"] == "1.000"
    assert [row["image tokens"] for row in rows.values()] == [16, 11, 9]
    assert written["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert {len(found) for found in written["seconds"]["4"].values()} == {2}
    printed = capsys.readouterr().out
    assert f"{BACKEND}, tiny at 32 px, batch 4, float32, adamw" in printed
    assert "| 4 | threshold, beta 0.3 | 11 |" in printed


def test_step_memory_measures_each_method_in_a_process(monkeypatch, tmp_path):
    run(step_memory, monkeypatch, "--methods", "cluster", "--results", str(tmp_path))
    written = json.loads((tmp_path / f"step_memory-{BACKEND}.json").read_text())
    (row,) = written["rows"]
    assert row["method"] == "cluster"
    assert row["image tokens"] == 8
    # On a CPU libraries alone take more than 0.1 GiB; a tiny model never takes 4.
    least = 0.0 if machine()["accelerator"] else 0.1
    assert least < float(row["peak memory (GiB)"]) < 4.0


def losses(step):
    return [np.ravel(step())[0] for _ in range(3)]


def test_a_step_trains():
    # On whole images: other patches each time would hide that the loss falls.
    first, second, third = losses(training_steps(["none"], TINY)["none"])
    assert first > second > third


@pytest.mark.any_backend
@pytest.mark.skipif(BACKEND != "torch", reason="open_clip runs on torch alone")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_open_clip_steps_beside(optimizer):
    pytest.importorskip("open_clip")
    setting = Setting("vit_s_16", 32, 2, optimizer=optimizer)
    steps = training_steps(OPEN_CLIP, setting)
    first, second, third = losses(steps["open_clip, none"])
    assert first > second > third
    assert all(loss > 0 for loss in losses(steps["open_clip, patch dropout 0.5"]))


def test_all_methods_are_the_default():
    options = type("Options", (), {"methods": None, "size": "vit_b_16"})
    expected = [*MASKINGS, *(OPEN_CLIP if BACKEND == "torch" else ())]
    assert step_methods(options) == expected


@pytest.mark.any_backend
@pytest.mark.skipif(
    machine()["accelerator"] is not None, reason="it is the accelerator's memory"
)
def test_peak_memory_counts_what_is_no_longer_in_use():
    before = float(step_memory.peak_memory())
    if before > 20.0:
        pytest.skip("no memory left to take")
    status = Path("/proc/self/status").read_text()
    resident = int(re.search(r"VmRSS:\s*(\d+) kB", status).group(1)) / 2**20
    bytearray(int((before - resident + 0.25) * 2**30))
    # Some of it lay in memory that the process already had.
    assert float(step_memory.peak_memory()) > before + 0.1
