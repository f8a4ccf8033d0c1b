"""The guide to several devices: they train as one."""

import re

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.any_backend]


def test_two_devices_train_as_one(run_guide, tmp_path):
    printed = run_guide("train_on_eight_gpus.py", tmp_path)
    difference = re.search(r"largest difference of a loss: (\S+)", printed)[1]
    assert float(difference) < 1e-3
    assert "samples of each process: [32, 32]" in printed
    assert "together one batch: True" in printed
    assert "the same history: True" in printed
