"""A training step stays short to read."""

import json

import keras
import pytest
import trace_step

pytestmark = pytest.mark.any_backend


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="Traced on torch.")
def test_a_step_enters_few_files_and_functions(tmp_path, capsys):
    trace_step.main(["--results", str(tmp_path)])
    rows = json.loads((tmp_path / "trace_step.json").read_text())["rows"]
    assert "models/contrastive_model.py" in {row["file"] for row in rows}
    assert len(rows) <= 12
    assert sum(row["functions"] for row in rows) <= 44
    assert "A training step enters" in capsys.readouterr().out
