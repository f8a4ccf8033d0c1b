"""The figure of a report."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

BINS = 40
# What is beyond these quantiles is counted at the edge.
LOW, HIGH = 0.005, 0.995


def draw_report(found, numbers):
    """Draws how sizes, shapes and lengths are distributed, and what is broken.

    Args:
        found: dict, as `report` returns it.
        numbers: dict from a name to an array.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots(2, 3)
    shorter = np.minimum(numbers["width"], numbers["height"])
    tokens = found["captions"]["tokens"] is not None
    _histogram(axes[0, 0], shorter, "shorter side", "pixels", log=True)
    _histogram(axes[0, 1], numbers["aspect"], "shape", "width / height", log=True)
    _histogram(axes[0, 2], numbers["bytes"] / 1e3, "size of file", "kB", log=True)
    _histogram(axes[1, 0], numbers["words"], "words per caption", "words")
    name = "tokens" if tokens else "characters"
    _histogram(axes[1, 1], numbers[name], f"{name} per caption", name)
    if tokens:
        axes[1, 1].set_xlim(right=max(axes[1, 1].get_xlim()[1], 80))
        axes[1, 1].axvline(77.5, color="black", linestyle="--", linewidth=1)
        axes[1, 1].set_title("tokens per caption (dashed: CLIP's 77)")
    _bars(axes[1, 2], found)
    for axis in axes.flat:
        axis.title.set_fontsize(11)
    for axis in axes.flat[:5]:
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for axis, what in zip(axes.flat, 3 * ["pictures"] + 2 * ["captions"]):
        axis.set_ylabel(what)
    figure.supxlabel(
        "The lowest and the highest 0.5 % of the values are counted at the edges.",
        fontsize=8,
    )
    return figure


def _histogram(axis, values, title, unit, log=False):
    axis.set_title(title)
    axis.set_xlabel(unit)
    if not len(values):
        return
    low, high = np.quantile(values, [LOW, HIGH])
    values = np.clip(values, low, high)
    if log:
        # Room for a bar where all are the same.
        low, high = (low, high) if high > low else (low / 1.5, high * 1.5)
        bins = np.geomspace(low, high, BINS + 1)
        axis.set_xscale("log")
        _plain_ticks(axis, low, high)
    else:
        width = max(int(np.ceil((high - low + 1) / BINS)), 1)
        bins = np.arange(low, high + 2 * width, width) - 0.5
        # A few around where all are the same, or ticks would be fractions.
        axis.set_xlim(max(min(bins[0], low - 3), 0), max(bins[-1], low + 3))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.hist(values, bins)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def _plain_ticks(axis, low, high):
    """A few round numbers, where powers of ten would be too few."""
    steps = [1] if high / low > 1e3 else [1, 2, 5]
    if high / low < 5:
        steps = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]
    tens = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = [step * ten for ten in tens for step in steps]
    ticks = [tick for tick in ticks if low * 0.95 <= tick <= high * 1.05]
    ticks = ticks[:: -(-len(ticks) // 7) or 1]
    axis.set_xticks(ticks, [f"{tick:,.4g}" for tick in ticks])
    axis.set_xticks([], minor=True)


def _bars(axis, found):
    """Counts of kinds of files, and of what is broken, as bars with words above."""
    formats, faults = found["pictures"]["formats"], found["by_reason"]
    counts = {**formats, **faults}
    values = list(counts.values())
    colors = ["C0"] * len(formats) + ["C3"] * len(faults)
    # Few of many are to be seen, too.
    lengths = np.maximum(values, 0.005 * max(values, default=1))
    axis.barh(np.arange(len(counts)), lengths, color=colors, height=0.35)
    for place, (name, value) in enumerate(counts.items()):
        axis.text(0, place - 0.25, f"{name}: {value:,}", fontsize=9)
    axis.set_ylim(max(len(counts), 4) - 0.5, -0.7)
    axis.set_xlim(0, 1.02 * max(values, default=1))
    axis.axis("off")
    axis.set_title("kinds of files" + (" (red: what is broken)" if faults else ""))
