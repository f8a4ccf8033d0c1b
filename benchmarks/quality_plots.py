"""The plots of `quality.py`."""

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
    """Shows how each method generalizes, the mean of all seeds.

    Losses on whole images of the training and the validation data, and the validation
    score against the training loss: of two methods at the same training loss, the one
    with the higher score generalizes better.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, mine in _by_method(runs).items():
        if "whole training loss" not in mine[0]["curve"][0]:
            continue
        steps = [point["step"] for point in mine[0]["curve"]]
        training, validation, score = (
            _curves(mine, key).mean(axis=0)
            for key in ("whole training loss", "whole validation loss", "score")
        )
        (line,) = left.plot(steps, validation, marker="o", ms=3, label=name)
        left.plot(steps, training, "--", color=line.get_color())
        right.plot(training, score, marker="o", ms=3, color=line.get_color())
    left.set(xlabel="training step", ylabel="loss on whole images")
    left.set_title("validation (solid) and training data (dashed)", fontsize=10)
    right.set(xlabel="loss on whole training images", ylabel=_label(runs))
    right.set_title("score at equal training loss; time runs to the right", fontsize=10)
    right.invert_xaxis()
    right.grid(alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    _finish(figure, left, path)


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
