"""Time and memory of training steps, at the smallest size."""

import json

import keras
import numpy as np
import pytest
import reporting
import step_memory
import step_time
from clip_steps import MASKINGS, OPEN_CLIP, Setting, training_steps
from flops import peak_tflops, training_flops, utilization

pytestmark = pytest.mark.slow

BACKEND = keras.backend.backend()
NAME = "-".join(filter(None, (BACKEND, reporting.card())))


@pytest.fixture
def measure(run, tmp_path):
    """Runs a benchmark at the smallest size; returns the name and content it writes."""

    def measure(benchmark, *arguments):
        options = "--size", "tiny", "--image-size", 32, "--results", tmp_path
        run(benchmark, *options, *arguments)
        (path,) = tmp_path.iterdir()
        return path.name, json.loads(path.read_text())

    return measure


@pytest.mark.any_backend
def test_tokens_and_arithmetic_are_those_of_each_method():
    setting = Setting()
    tokens = {name: setting.image_tokens(name) for name in (*MASKINGS, *OPEN_CLIP)}
    assert tokens == {
        "none": 196,
        "random": 98,
        "cluster": 98,
        "threshold, beta 0.5": 98,
        "threshold, beta 0.3": 137,
        "resized": 100,
        "none, 77 tokens": 196,
        "random, 77 tokens": 98,
        "open_clip, none": 196,
        "open_clip, patch dropout 0.5": 98,
    }
    assert setting.side("resized") == 160
    whole = setting.arithmetic("none")
    assert setting.arithmetic("open_clip, none") == whole
    for name in ("random", "cluster", "open_clip, patch dropout 0.5", "resized"):
        assert setting.arithmetic(name) / whole == pytest.approx(0.57, abs=0.01)
    assert setting.arithmetic("threshold, beta 0.3") / whole > 0.7


@pytest.mark.any_backend
def test_step_time_publishes_every_method(measure, tmp_path, capsys):
    methods = ("--methods", "none", "threshold, beta 0.3", "resized")
    options = ("--rounds", "2", "--batch-size", "4")
    name, written = measure(step_time, *options, *methods)
    assert name == f"step_time-{NAME}.json"
    rows = {row["method"]: row for row in written["rows"]}
    assert list(rows) == list(methods[1:])
    assert rows["none"]["/ none"] == rows["none"]["arithmetic / none"] == "1.000"
    assert [row["image tokens"] for row in rows.values()] == [16, 11, 9]
    assert {len(found) for found in written["seconds"]["4"].values()} == {2}
    assert str(tmp_path) not in json.dumps(written)
    assert "| 4 | threshold, beta 0.3 | 11 |" in capsys.readouterr().out


@pytest.mark.any_backend
def test_step_memory_measures_each_method_in_a_process(measure):
    name, written = measure(step_memory, "--batch-size", 4, "--methods", "cluster")
    assert name == f"step_memory-{BACKEND}.json"
    (row,) = written["rows"]
    assert (row["method"], row["image tokens"]) == ("cluster", 8)
    # On a CPU libraries alone take more than 0.1 GiB; a tiny model never takes 4.
    least = 0.0 if reporting.machine()["accelerator"] else 0.1
    assert least < float(row["peak memory (GiB)"]) < 4.0


# On whole images: other patches each time would hide that the loss falls.
@pytest.mark.parametrize(
    ("name", "size"), [("none", "tiny"), ("open_clip, none", "vit_s_16")]
)
def test_a_step_trains(name, size):
    if name in OPEN_CLIP and BACKEND != "torch":
        pytest.skip("open_clip runs on torch alone")
    setting = Setting(size, image_size=32, batch_size=2)
    step = training_steps([name], setting)[name]
    first, second, third = (np.ravel(step())[0] for _ in range(3))
    assert first > second > third


@pytest.mark.any_backend
def test_utilization_is_the_arithmetic_over_the_time_and_the_peak():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    # The same chip, slower, and a name that contains another.
    for name in ("NVIDIA H100 PCIe", "NVIDIA L40", None):
        assert peak_tflops(name) is None
    # Half of 989 TFLOP/s, for two seconds.
    assert utilization(989e12, 2.0, 989) == 0.5
    # open_clip publishes 41.09 GFLOP for the forward pass of a pair.
    assert training_flops("vit_b_16") == pytest.approx(3 * 41.09e9, rel=1e-3)
    seconds = {"none": [0.1, 0.1, 0.3]}
    setting = Setting(batch_size=256)
    row = step_time.table_row("none", setting, seconds, {"none": 1.5}, 989.0)
    expected = 3 * 41.09e9 * 256 / 0.1 / 989e12
    assert row["utilization"] == f"{expected:.1%}" == "31.9%"
    assert row["images/s"] == "2560"
    assert row["memory of a step (GiB)"] == "1.50"
    row = step_time.table_row("none", setting, seconds, {"none": None}, None)
    assert not {"utilization", "memory of a step (GiB)"} & set(row)
