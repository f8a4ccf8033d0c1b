"""The plots of `quality.py`.

    python benchmarks/quality_plots.py A.json B.json PLOT.png

plots how the runs of published tables generalize, such as those of two lengths.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_learning_curves(runs, path):
    """Validation score against steps, the mean of all seeds and their range."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, mine in _by_method(runs).items():
        steps = [point["step"] for point in mine[0]["curve"]]
        scores = _curves(mine)
        (line,) = axes.plot(steps, scores.mean(axis=0), marker="o", ms=3, label=name)
        axes.fill_between(
            steps,
            scores.min(0),
            scores.max(0),
            color=line.get_color(),
            alpha=0.12,
            lw=0,
        )
    axes.set(xlabel="training step", ylabel=_label(runs))
    _finish(figure, axes, path)


def plot_cost_quality(runs, costs, path):
    """Validation score against training time, one line per method.

    Times are steps times the cost of a step, measured in turn for all methods, so
    that what else the machine did during a run does not count.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, mine in _by_method(runs).items():
        if name not in costs:
            continue
        seconds = [point["step"] * costs[name] / 1000 for point in mine[0]["curve"]]
        axes.plot(seconds, _curves(mine).mean(axis=0), marker="o", ms=3, label=name)
    axes.set(xlabel="training time (seconds)", ylabel=_label(runs))
    _finish(figure, axes, path)


def plot_losses(runs, path):
    """Losses on whole images of the training and the validation data, against steps."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, mine in _by_method(runs).items():
        if "whole training loss" not in mine[0]["curve"][0]:
            continue
        steps = [point["step"] for point in mine[0]["curve"]]
        training = _curves(mine, "whole training loss").mean(axis=0)
        validation = _curves(mine, "whole validation loss").mean(axis=0)
        (line,) = axes.plot(steps, validation, marker="o", ms=3, label=name)
        axes.plot(steps, training, "--", color=line.get_color())
    axes.set(xlabel="training step", ylabel="loss on whole images")
    axes.set_title("validation (solid) and training data (dashed)", fontsize=10)
    _finish(figure, axes, path)


def plot_generalization(runs, path):
    """What is learned of the training data, and what of it holds for other data.

    One point for each run, a line for each method from its shortest to its longest
    training, through the means of its seeds.
    """
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, mine in _by_method(runs).items():
        by_steps = {}
        for run in mine:
            last, scores = run["curve"][-1], run["validation"]
            if "whole training loss" in last and "loss" in scores:
                point = last["whole training loss"], scores["loss"]
                by_steps.setdefault(run["steps"], []).append(point)
        if not by_steps:
            continue
        means = [np.mean(by_steps[steps], axis=0) for steps in sorted(by_steps)]
        label = name.replace("none", "whole images").replace(
            "resized", "smaller images"
        )
        (line,) = axes.plot(*np.transpose(means), lw=1, marker="o", ms=6, label=label)
        points = np.concatenate(list(by_steps.values()))
        axes.plot(*points.T, ".", ms=4, color=line.get_color(), alpha=0.5)
    axes.set(xlabel="loss on training images", ylabel="loss on validation images")
    axes.set_title(
        "whole images, the second at the best temperature; training runs to the right",
        fontsize=10,
    )
    axes.invert_xaxis()
    _finish(figure, axes, path)


def _by_method(runs):
    methods = {}
    for run in runs:
        methods.setdefault(run["setting"]["method"], []).append(run)
    return methods


def _curves(runs, key="score"):
    return np.array([[point[key] for point in run["curve"]] for run in runs])


def _label(runs):
    retrieval = any("recall" in key for key in runs[0]["validation"])
    score = "recall@10, mean of both ways" if retrieval else "zero-shot accuracy"
    return f"validation {score} (%)"


def _finish(figure, axes, path):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    *tables, target = sys.argv[1:]
    published = [json.loads(Path(each).read_text())["runs"] for each in tables]
    plot_generalization([run for runs in published for run in runs], target)
