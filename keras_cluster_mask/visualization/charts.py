"""Charts of training runs and of the statistics of maskings."""

import numbers
from collections.abc import Mapping, Sequence

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_cluster_mask.masking import MaskingStatistics

# The metrics of a `ContrastiveModel` that are shown, and how they are called.
ACCURACIES = {
    "image_to_text_accuracy": "image to text",
    "text_to_image_accuracy": "text to image",
}


def plot_history(
    history: keras.callbacks.History | Mapping[str, Sequence[float]],
    validation_freq: int | Sequence[int] | None = None,
) -> Figure:
    """Shows the curves of a training run: loss, and accuracy within the batch.

    Of a Keras model other than a `ContrastiveModel`, loss and all metrics, except those
    that a callback reports in some epochs only: a history does not say in which.

    Args:
        history: The `keras.callbacks.History` that `fit` returned, or its
            dictionary.
        validation_freq: Integer, or a list of epochs from 1, as it was given to `fit`.
            `None`: the integer that fits the number of validations.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: For a history without epochs, and if the epochs of validation are
            not known or do not fit.
    """
    logs = getattr(history, "history", history)
    names = [] if not isinstance(logs, dict) else [n for n in logs if n[:4] != "val_"]
    if not names:
        raise ValueError(
            "`history` must be what `fit` returned after at least one epoch. "
            f"Received: history={logs}"
        )
    known = getattr(history, "epoch", range(max(len(logs[name]) for name in names)))
    epochs = [epoch + 1 for epoch in known]
    names = [name for name in names if len(logs[name]) == len(epochs)]
    is_own = ACCURACIES.keys() <= {*names}
    others = ACCURACIES if is_own else {n: n for n in names if n != "loss"}
    panels = {
        "contrastive loss" if is_own else "loss": {n: n for n in names if n == "loss"},
        "accuracy within the batch" if is_own else "metrics": others,
    }
    panels = {title: labels for title, labels in panels.items() if labels}
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, labels) in zip(axes, panels.items()):
        for name, label in labels.items():
            # A curve of one epoch is a point.
            style = {"marker": "."}
            (line,) = axis.plot(epochs, logs[name], label=f"{label}, training", **style)
            values = logs.get(f"val_{name}", ())
            if len(values):
                due = _validation_epochs(epochs, len(values), validation_freq)
                style |= {"color": line.get_color(), "label": f"{label}, validation"}
                axis.plot(due, values, "--", **style)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    if is_own:
        axes[-1].set_ylim(0, 1)
    return figure


def _validation_epochs(epochs, count, freq):
    """The epochs, from 1, that were followed by a validation."""
    freqs = [freq]
    if freq is None:
        freqs = [1] if count == len(epochs) else range(2, max(epochs) + 1)
    fitting = {tuple(epoch for epoch in epochs if _is_due(epoch, f)) for f in freqs}
    fitting = [each for each in fitting if len(each) == count]
    if len(fitting) != 1:
        raise ValueError(
            "`validation_freq` must be what `fit` was given, an integer or a list of "
            f"epochs. Received: validation_freq={freq!r}, with {count} validations in "
            f"the epochs {epochs[0]} to {epochs[-1]}"
        )
    return fitting[0]


def _is_due(epoch, freq):
    if isinstance(freq, numbers.Integral) and not isinstance(freq, bool):
        return freq > 0 and epoch % freq == 0
    return isinstance(freq, list | tuple | set | np.ndarray) and epoch in freq


def plot_masking_statistics(statistics: MaskingStatistics) -> Figure:
    """Shows what a masking does to the images of a dataset.

    Histograms of the share that is masked of each image, of the similarity at the
    cut, and of the patches in a cluster beside those its anchor takes; how many
    patches the anchors of an image take, the greediest first; and how often each
    position is masked. Without clusters, the first and the last of these.

    Example:

    ```python
    images = np.random.randint(0, 256, (32, 64, 64, 3)).astype("uint8")
    masking = kcm.ClusterMasking(patch_size=8, mask_ratio=0.5)
    statistics = kcm.masking.masking_statistics(masking, images, verbose=0)
    figure = kcm.visualization.plot_masking_statistics(statistics)
    figure.savefig("statistics.png")
    ```

    Args:
        statistics: What `kcm.masking.masking_statistics` returned.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `statistics` is something else.
    """
    if not isinstance(statistics, MaskingStatistics):
        raise ValueError(
            "`statistics` must be what `kcm.masking.masking_statistics` returns. "
            f"Received: statistics={statistics!r}"
        )
    has_clusters = statistics.cluster_sizes is not None
    figure = Figure(figsize=(12, 6) if has_clusters else (8, 3.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    layout = [["ratio", "positions"]]
    if has_clusters:
        layout = [["ratio", "sizes", "positions"], ["cut", "ranks", "positions"]]
    axes = figure.subplot_mosaic(
        layout, width_ratios=[1] * (len(layout[0]) - 1) + [1.1]
    )
    _plot_shares(axes["ratio"], statistics.mask_ratio)
    axes["ratio"].set(xlim=(-0.02, 1.02), xlabel="share of the patches that is masked")
    _plot_positions(axes["positions"], statistics.masked_by_position)
    if has_clusters:
        _plot_shares(axes["cut"], statistics.similarity_at_cut)
        axes["cut"].set(xlabel="lowest similarity of a patch taken")
        _plot_sizes(axes["sizes"], statistics)
        _plot_ranks(axes["ranks"], statistics.patches_taken_by_rank)
    titles = {
        "ratio": "mask ratio of each image",
        "cut": "similarity at the cut",
        "sizes": "clusters, and what their anchors take",
        "ranks": "anchors of an image, the greediest first",
        "positions": "where images are masked",
    }
    for name, axis in axes.items():
        axis.set_title(titles[name], fontsize=11)
    return figure


def _plot_shares(axis, values):
    """A histogram of numbers per image, and their mean."""
    values = values[~np.isnan(values)]
    axis.set_ylabel("share of the images")
    if not len(values):
        return
    # Bins lie around multiples of their width, as ratios often are such numbers.
    first = np.floor(40 * min(0.0, values.min()))
    edges = (np.arange(first, 42) - 0.5) / 40
    axis.hist(values, edges, weights=np.full(len(values), 1 / len(values)))
    axis.axvline(
        values.mean(), color="black", linestyle="--", linewidth=1,
        label=f"mean {values.mean():.3f}",
    )  # fmt: skip
    axis.legend(fontsize=8)


def _plot_sizes(axis, statistics):
    sizes = np.arange(statistics.num_patches + 1)
    largest = np.flatnonzero(statistics.cluster_sizes)[-1]
    width = 1 + largest // 40  # Whole numbers of patches to a bin.
    edges = np.arange(0, largest + width + 1, width) - 0.5
    for counts, label, options in (
        (statistics.patches_taken, "taken by the anchor", {"alpha": 0.6}),
        (statistics.cluster_sizes, "in the cluster", {"histtype": "step"}),
    ):
        mean = np.average(sizes, weights=counts)
        axis.hist(
            sizes, edges, weights=counts / counts.sum(),
            label=f"{label}, mean {mean:.1f}", **options,
        )  # fmt: skip
    axis.set(xlabel="patches", ylabel="share of the anchors")
    axis.legend(fontsize=8)


def _plot_ranks(axis, patches_taken):
    axis.bar(np.arange(1, len(patches_taken) + 1), patches_taken)
    axis.set(xlabel="anchor by rank", ylabel="patches taken, mean")
    axis.set_xlim(0.4, len(patches_taken) + 0.6)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _plot_positions(axis, masked):
    # A range of 0.2 at least, or a few images too many would look like a pattern.
    middle = (masked.min() + masked.max()) / 2
    reach = max(0.1, masked.max() - middle)
    shown = axis.imshow(
        masked, cmap="viridis", vmin=middle - reach, vmax=middle + reach
    )
    axis.set(xlabel="column of patches", ylabel="row of patches")
    for direction in (axis.xaxis, axis.yaxis):
        direction.get_major_locator().set_params(integer=True)
    axis.figure.colorbar(shown, ax=axis, shrink=0.75, label="share of the images")
