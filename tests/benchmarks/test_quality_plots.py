import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import quality_plots

pytestmark = pytest.mark.any_backend

RESULTS = Path(quality_plots.__file__).parent / "results"
RUNS = str(RESULTS / "quality" / "flickr8k-30-epochs-torch.json")


def drawn(monkeypatch, tmp_path, *arguments):
    """Labels and points of the axes that a command plots."""
    drawings = []
    monkeypatch.setattr(quality_plots.plt, "close", drawings.append)
    monkeypatch.setattr(sys, "argv", ["quality_plots.py", *arguments])
    quality_plots.main()
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    (figure,) = drawings
    return [
        {line.get_label(): line.get_xydata() for line in axes.get_lines()}
        for axes in figure.axes
    ]


def test_what_stays_has_a_point_for_each_run_on_half_of_the_patches(
    monkeypatch, tmp_path
):
    masks = str(RESULTS / "what_stays-flickr8k.json")
    path = str(tmp_path / "plot.png")
    (lines,) = drawn(monkeypatch, tmp_path, "what-stays", path, RUNS, masks)
    assert len(lines["random (3)"]) == 3
    assert len(lines["threshold (1)"]) == 1
    # A quarter of the patches.
    assert not any("grid" in name for name in lines)


def test_generalization_joins_the_lengths_of_a_method(monkeypatch, tmp_path):
    longer = RUNS.replace("30-epochs", "60-epochs")
    path = str(tmp_path / "plot.png")
    (lines,) = drawn(monkeypatch, tmp_path, "generalization", path, RUNS, longer)
    assert len(lines["random"]) == 2
    assert len(lines["whole images"]) == 1


def test_generalization_may_show_some_methods_alone(monkeypatch, tmp_path):
    options = (str(tmp_path / "plot.png"), RUNS, "--methods", "random", "k-means")
    (lines,) = drawn(monkeypatch, tmp_path, "generalization", *options)
    assert {"random", "k-means"} <= set(lines)
    assert "cluster" not in lines


def test_another_plot_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        drawn(monkeypatch, tmp_path, "generalisation", "plot.png", RUNS)
    assert "invalid choice" in capsys.readouterr().err
