"""The guide to scaling up: it runs, and its results are those that its text states."""

import os
import re

import keras
import pytest

pytestmark = pytest.mark.slow

TINY = dict(
    IMAGE_SIZE="24", VOCABULARY_SIZE="600", BATCH_SIZE="24", STEPS_PER_EPOCH="4"
)
DEVICES = "--xla_force_host_platform_device_count=2"


def test_it_runs_in_a_tiny_setting(shard, run_guide, tmp_path):
    printed = run_guide(
        "scaling_up.py",
        **TINY,
        XLA_FLAGS=f"{os.environ['XLA_FLAGS']} {DEVICES}",
        # On a busy machine threads of torch would wait for one another.
        OMP_NUM_THREADS="1",
        TRAIN=str(shard),
        HELD_OUT=str(shard),
    )

    def number(after):
        return float(re.search(rf"{after}.* (\S+)", printed)[1])

    assert number("largest gradient") > 0.1
    assert number("difference in micro-batches") < 1e-5
    if keras.backend.backend() != "torch":
        assert number("difference on two devices") < 1e-5
    if keras.backend.backend() == "jax":
        own, whole = re.search(r"holds (\d+) of (\d+) MiB", printed).groups()
        assert 0.5 <= int(own) / int(whole) < 0.6
    assert "together the batch of one process: True" in printed
    assert "interrupted after 7 steps, last checkpoint step-000000006.npz" in printed
    assert "the same weights, bit for bit: True" in printed
    # 9 patches, of which 4 stay, the class token, and the text.
    tokens = re.findall(r"(\d+) tokens per sample, +[1-9]", printed)
    assert tokens == ["22", "17", "17"]
    assert number("vision_encoder") == 0.0
    assert number("text_encoder") > 0.0
    assert number("cosine") == pytest.approx(1.0, abs=0.2)
    assert number("image_tower") < 1e-5
    assert (tmp_path / "results" / "speed.png").stat().st_size
