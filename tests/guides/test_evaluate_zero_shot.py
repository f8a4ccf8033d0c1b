"""The guide to evaluation: that it runs, and writes what it says."""

import pytest

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]


def test_it_runs_for_an_epoch(run_guide, tmp_path):
    pytest.importorskip("faiss")
    printed = run_guide("evaluate_zero_shot.py", EPOCHS="1")
    for line in ("image_to_text_recall@1 ", "top_1 ", "mean_per_class "):
        assert line in printed
    assert (tmp_path / "results" / "search.png").stat().st_size > 10_000
