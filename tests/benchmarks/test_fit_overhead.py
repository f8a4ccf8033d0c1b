import json
import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="It is about JAX."),
]


def test_each_way_to_run_steps_is_timed(tmp_path, monkeypatch):
    import fit_overhead

    arguments = ["--steps", "3", "--rounds", "2", "--batch-size", "2"]
    arguments += ["--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [fit_overhead.__file__, *arguments])
    fit_overhead.main()
    found = json.loads((tmp_path / "fit_overhead.json").read_text())
    assert len(found["rows"]) == len(found["seconds"]) == 6
    assert all(len(times) == 2 for times in found["seconds"].values())
    assert all(seconds > 0 for times in found["seconds"].values() for seconds in times)
