"""What users enter stays short to read."""

import collections
import json

import keras
import pytest
import trace_step

pytestmark = pytest.mark.any_backend

# The most files and functions of each way.
MOST = {
    "from_backbone": (14, 52),
    "row": (17, 106),
    "fit": (30, 142),
    "step": (12, 49),
    "checkpoint": (12, 41),
}


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="Traced on torch.")
def test_each_way_enters_few_files_and_functions(tmp_path, capsys):
    trace_step.main(["--results", str(tmp_path)])
    assert "Files and functions that are entered" in capsys.readouterr().out
    rows = json.loads((tmp_path / "trace_step.json").read_text())["rows"]
    assert ("step", "models/contrastive_model.py") in {
        (row["way"], row["file"]) for row in rows
    }
    files, functions = collections.Counter(), collections.Counter()
    for row in rows:
        files[row["way"]] += 1
        functions[row["way"]] += row["functions"]
    for way, most in MOST.items():
        assert 1 < files[way] <= most[0]
        assert 1 < functions[way] <= most[1]
