import json
import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "torch", reason="a program of torch's processes"
    ),
]


def test_one_process_and_two_apart_and_together_are_timed(monkeypatch, tmp_path):
    arguments = ["--size", "tiny", "--image-size", "32", "--batch-size", "4"]
    arguments += ["--rounds", "1", "--steps", "2", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [processes.__file__, *arguments])
    processes.main()
    written = json.loads((tmp_path / "processes-tiny.json").read_text())
    assert [row["processes"] for row in written["rows"]] == [*processes.KINDS]
    alone, apart, together = (written["runs"][kind][0] for kind in processes.KINDS)
    assert (len(alone), len(apart), len(together)) == (1, 2, 2)
    for run in (*alone, *apart, *together):
        assert len(run["seconds"]) == 2
        assert run["gradients"] > 0
    # Alone there is nothing to reduce.
    assert [len(run["reducing"]) for run in (*alone, *apart)] == [0, 0, 0]
    assert [len(run["reducing"]) for run in together] == [3, 3]
