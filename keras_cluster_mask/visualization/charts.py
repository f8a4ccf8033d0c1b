"""Charts of training runs and of masking statistics."""

from collections.abc import Mapping, Sequence

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_cluster_mask.checks import check_integer, is_integer

# The metrics of each panel, and their labels in it.
PANELS = {
    "contrastive loss": {"loss": "loss, training"},
    "accuracy within the batch": {
        "image_to_text_accuracy": "image to text, training",
        "text_to_image_accuracy": "text to image, training",
    },
}


def plot_history(
    history: keras.callbacks.History | Mapping[str, Sequence[float]],
    validation_freq: int | Sequence[int] = 1,
    chance: Mapping[str, float] | None = None,
) -> Figure:
    """Plots the curves of a training run: loss, accuracy within the batch, and recall.

    Metrics that are not in the logs are left out. The recall comes from
    `kcm.callbacks.Retrieval`, and your own loss may have no accuracies.

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
            "`validation_freq` must match `fit`. Received: "
            f"validation_freq={validation_freq}, {due} epochs in {len(epochs)}, and "
            f"{count} validations"
        )
    recall = {
        x: x.removeprefix("val_").replace("_", " ") for x in logs if "recall@" in x
    }
    # A user's own loss may have no accuracies.
    panels = {**PANELS, "recall": recall}
    panels = {title: x for title, x in panels.items() if not x.keys().isdisjoint(logs)}
    if not panels:
        raise ValueError(
            "`history` must have a metric that is plotted, such as 'loss'. "
            f"Received: metrics {[*logs]}"
        )
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, labels) in zip(axes, panels.items()):
        for name, label in labels.items():
            if name not in logs:
                continue
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


def plot_masking_statistics(statistics: Mapping[str, np.ndarray]) -> Figure:
    """Plots how many patches a masking keeps in the images of a dataset, and where.

    The figure has a histogram of the kept fraction of each image, and a map of how
    often each position is kept.

    Example:

    ```python
    images = np.random.randint(0, 256, (32, 64, 64, 3)).astype("uint8")
    masking = kcm.ClusterMasking(patch_size=8, mask_ratio=0.5)
    statistics = kcm.masking.masking_statistics(masking, images, verbose=0)
    figure = kcm.visualization.plot_masking_statistics(statistics)
    figure.savefig("statistics.png")
    ```

    Args:
        statistics: The result of `kcm.masking.masking_statistics`.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    ratios, positions = figure.subplots(1, 2, width_ratios=[1, 1.1])
    # Bins are centered on multiples of their width, because ratios often are such
    # numbers.
    edges = (np.arange(42) - 0.5) / 40
    values = statistics["keep_ratio"]
    ratios.hist(values, edges, weights=np.full(len(values), 1 / len(values)))
    ratios.axvline(
        values.mean(), color="black", linestyle="--", linewidth=1,
        label=f"mean {values.mean():.3f}",
    )  # fmt: skip
    ratios.set_title("keep ratio of each image", fontsize=11)
    ratios.set(xlabel="fraction of patches kept", ylabel="fraction of images")
    ratios.set_xlim(-0.02, 1.02)
    ratios.legend(fontsize=8)
    # Use a range of at least 0.2. Otherwise a difference of a few images would look
    # like a pattern.
    kept = statistics["kept_by_position"]
    middle = (kept.min() + kept.max()) / 2
    reach = max(0.1, kept.max() - middle)
    shown = positions.imshow(
        kept, cmap="viridis", vmin=middle - reach, vmax=middle + reach
    )
    positions.set_title("how often each position is kept", fontsize=11)
    positions.set(xlabel="column of patches", ylabel="row of patches")
    for direction in (positions.xaxis, positions.yaxis):
        direction.get_major_locator().set_params(integer=True)
    figure.colorbar(shown, ax=positions, shrink=0.75, label="fraction of images")
    return figure
