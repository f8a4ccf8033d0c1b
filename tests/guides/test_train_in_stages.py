"""The guide to training in stages: that it runs, and compares what it says."""

import re

import pytest

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]


def test_it_compares_stages_with_a_training_at_full_size(run_guide):
    printed = run_guide("train_in_stages.py", EPOCHS="1")
    assert "mask_ratio: 0.4" in printed
    found = re.findall(
        r"Trained (.*) in \d+ s\n.*?@10 (.*?) %\n.*?@10 (.*?) %", printed
    )
    assert [name for name, *_ in found] == ["in stages", "at full size"]
    # Chance is 2.9 %.
    assert min(float(recall) for _, *both in found for recall in both) > 4
