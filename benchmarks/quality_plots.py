"""The plots of `quality.py`.

    python benchmarks/quality_plots.py generalization PLOT.png RUNS.json RUNS.json
    python benchmarks/quality_plots.py what-stays PLOT.png RUNS.json WHAT_STAYS.json

plot how the runs of published tables generalize, such as those of two lengths, and
their losses against what `what_stays.py` says of their masks.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from reporting import parser

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Twenty colors, the strong ones first.
COLORS = plt.cm.tab20.colors[::2] + plt.cm.tab20.colors[1::2]
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLORS)


def plot_learning_curves(runs, path):
    """Validation score against steps, the mean of all seeds and their range."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, mine in _by_method(runs).items():
        steps = [point["step"] for point in mine[0]["curve"]]
        scores = _curves(mine)
        (line,) = axes.plot(
            steps, scores.mean(axis=0), marker="o", ms=3, label=_title(name)
        )
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
    whole = costs["random"] * max(run["steps"] for run in runs)
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, mine in _by_method(runs).items():
        if name not in costs:
            continue
        times = [point["step"] * costs[name] / whole for point in mine[0]["curve"]]
        scores = _curves(mine).mean(axis=0)
        axes.plot(times, scores, marker="o", ms=3, label=_title(name))
    axes.set(xlabel="training time (random masking: 1)", ylabel=_label(runs))
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
        (line,) = axes.plot(steps, validation, marker="o", ms=3, label=_title(name))
        axes.plot(steps, training, "--", color=line.get_color())
    axes.set(xlabel="training step", ylabel="loss on whole images")
    axes.set_title("validation (solid) and training data (dashed)", fontsize=10)
    _finish(figure, axes, path)


def plot_generalization(runs, path, top=None):
    """What is learned of the training data, and what of it holds for other data.

    One point for each run, a line for each method from its shortest to its longest
    training, through the means of its seeds.
    """
    figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
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
        (line,) = axes.plot(
            *np.transpose(means), lw=1, marker="o", ms=6, label=_title(name)
        )
        points = np.concatenate(list(by_steps.values()))
        axes.plot(*points.T, ".", ms=4, color=line.get_color(), alpha=0.5)
    axes.set(
        xlabel="loss on training images, falling to the right",
        ylabel="loss on validation images, at the best temperature",
    )
    axes.invert_xaxis()
    axes.set_ylim(top=top)
    _finish(figure, axes, path)


def plot_what_stays(runs, measured, path):
    """The loss after training against how much the patches that stay resemble others.

    Args:
        runs: Finished runs of `quality.py`.
        measured: The rows of `what_stays.py`, of which only those count that keep half
            of the patches.
        path: Of the image to write.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    by_method, means = _by_method(runs), []
    for row in measured:
        mine = by_method.get(row["method"], ())
        losses = [run["validation"]["loss"] for run in mine]
        if losses and abs(row["kept"] - 0.5) < 0.01:
            name = f"{_title(row['method'])} ({len(losses)})"
            values = np.full(len(losses), row["look-alike"])
            axes.plot(values, losses, "o", ms=5, alpha=0.7, label=name)
            means.append((row["look-alike"], np.mean(losses)))
    correlation = np.corrcoef(np.transpose(means))[0, 1]
    axes.set(
        xlabel="similarity of a masked patch to the most similar patch that stays",
        ylabel="loss on validation images",
    )
    axes.set_title(
        f"correlation of the means of {len(means)} maskings: {correlation:.2f}",
        fontsize=10,
    )
    _finish(figure, axes, path)


# Parts of names, as the pages have them.
TITLES = {
    "none": "whole images",
    "resized": "smaller images",
    "softer cluster": "cluster, softness 0.3",
    "cluster of 6 anchors": "cluster, 6 anchors",
    "random words, 12 tokens, whole texts last": "10 tokens",
    "random words, whole texts last": "6 tokens",
    "rare words 1e-3, 12 tokens, whole texts last": "10 tokens of rare words",
}


def _title(method):
    """The name of a method on the pages."""
    for name, title in TITLES.items():
        method = method.replace(name, title)
    recipe = {"random, 10 tokens": "the recipe: random, 10 tokens"}
    return recipe.get(method, method)


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
    _, labels = axes.get_legend_handles_labels()
    many = dict(loc="center left", bbox_to_anchor=(1, 0.5)) if len(labels) > 8 else {}
    axes.legend(frameon=False, fontsize=8, **many)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parsed = parser(__doc__)
    parsed.add_argument("plot", choices=("generalization", "what-stays"))
    parsed.add_argument("path", help="of the image to write")
    parsed.add_argument("--top", type=float, help="upper end of the generalization")
    parsed.add_argument("--methods", nargs="+", help="of the generalization, not all")
    parsed.add_argument("files", nargs="+", type=Path, help="JSON files of results")
    options = parsed.parse_args()
    results = [json.loads(file.read_text()) for file in options.files]
    if options.plot == "what-stays":
        runs, masks = results
        plot_what_stays(runs["runs"], masks["measured"], options.path)
    else:
        runs = [run for found in results for run in found["runs"]]
        if options.methods:
            runs = [x for x in runs if x["setting"]["method"] in options.methods]
        plot_generalization(runs, options.path, options.top)


if __name__ == "__main__":
    main()
