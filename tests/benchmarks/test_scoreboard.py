"""Recall against minutes, from published results."""

import json
import shutil

import pytest
import scoreboard

from tests.helpers import ROOT

pytestmark = pytest.mark.any_backend


def test_a_record_counts_everything_and_is_added_to_those_before(
    tmp_path, monkeypatch, capsys
):
    results = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks/results", results)
    before = json.loads((results / "scoreboard.json").read_text())
    command = ["scoreboard.py", "--results", results, "--plot", tmp_path / "a.png"]
    monkeypatch.setattr("sys.argv", [*map(str, command), "--record", "nothing"])
    scoreboard.main()
    after = json.loads((results / "scoreboard.json").read_text())
    # The page shows what the published results say.
    assert after["points"] == before["points"]
    *earlier, last = after["rows"]
    assert earlier == before["rows"]
    assert last["what"] == "nothing"
    assert last["what"] in capsys.readouterr().out
    run = json.loads((results / "fine_tune.json").read_text())["rows"]
    (run,) = (x for x in run if x["run"].endswith("3-epochs-all-photographs-test"))
    stages = [
        float(run[f"{stage}, minutes"].split()[0])
        for stage in ("features", "projections", "encoders")
    ]
    assert last["minutes to 69 %"] == pytest.approx(sum(stages), abs=0.2)
    assert last["69 %, after projections"] == pytest.approx(stages[2], abs=0.1)
    assert (tmp_path / "a.png").stat().st_size > 10_000
