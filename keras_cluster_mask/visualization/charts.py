"""Charts of training runs."""

from collections.abc import Mapping, Sequence

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_cluster_mask.checks import check_integer, is_integer

# The metrics of each panel, and their labels in it.
PANELS = {
    "contrastive loss": {"loss": "loss, training"},
    "accuracy within the batch": {"accuracy": "accuracy, training"},
}


def plot_history(
    history: keras.callbacks.History | Mapping[str, Sequence[float]],
    validation_freq: int | Sequence[int] = 1,
    chance: Mapping[str, float] | None = None,
) -> Figure:
    """Plots the curves of a training run: loss, accuracy within the batch, and recall.

    Metrics that are not in the logs are not plotted. The recall comes from
    `kcm.callbacks.Retrieval`, and your own loss may have no accuracy.

    Args:
        history: The `keras.callbacks.History` that the `fit` of a `ContrastiveModel`
            returned, or its dictionary.
        validation_freq: Integer, or a list of epochs counted from 1, as passed to
            `fit`.
        chance: Dictionary from metrics, without `"val_"`, to their values at chance,
            which are drawn as dotted lines: for example
            `{"loss": math.log(batch_size)} | retrieval.chance` for a softmax loss and a
            `kcm.callbacks.Retrieval`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `validation_freq` does not match the run, or if there is no
            metric to plot.
    """
    logs = getattr(history, "history", history)
    longest = range(max(map(len, logs.values()), default=0))
    epochs = np.array(getattr(history, "epoch", longest)) + 1
    was_due = np.isin(epochs, validation_freq)
    if is_integer(validation_freq):
        was_due = epochs % check_integer("validation_freq", validation_freq) == 0
    count, due = len(logs.get("val_loss", ())), int(was_due.sum())
    if count not in (0, due):
        raise ValueError(
            "`validation_freq` must be the value that was passed to `fit`. Received: "
            f"validation_freq={validation_freq}, for {due} validations in "
            f"{len(epochs)} epochs, and a history with {count} validations"
        )
    recall = {
        x: x.removeprefix("val_").replace("_", " ") for x in logs if "recall@" in x
    }
    # A user's own loss may have no accuracy.
    panels = {**PANELS, "recall": recall}
    panels = {title: x for title, x in panels.items() if not x.keys().isdisjoint(logs)}
    if not panels:
        raise ValueError(
            "`history` must have a metric that can be plotted, such as 'loss'. "
            f"Received: metrics {[*logs]}"
        )
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, labels) in zip(axes, panels.items()):
        for name, label in labels.items():
            # A resumed run may have the recall only for its last epochs. The curve of a
            # single epoch is a point, which only a marker shows.
            shown = epochs[-len(logs[name]) :]
            (line,) = axis.plot(shown, logs[name], ".-", label=label)
            values = logs.get(f"val_{name}", ())
            if len(values):
                label = label.replace("training", "validation")
                color = line.get_color()
                axis.plot(epochs[was_due], values, ".--", color=color, label=label)
        chances = [y for x, y in (chance or {}).items() if {x, f"val_{x}"} & {*labels}]
        # Values that look the same get one line.
        for label, value in {f"chance, {y:.2g}": y for y in sorted(chances)}.items():
            axis.axhline(value, color="black", linestyle=":", label=label)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        if "accuracy" in title:
            axis.set_ylim(0, 1)
    return figure
