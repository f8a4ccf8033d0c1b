"""Plots of masks, training runs and retrievals, with matplotlib."""

import numbers

import matplotlib
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from keras_cluster_mask.masking import (
    ClusterMasking,
    MaskingStatistics,
    RandomMasking,
)
from keras_cluster_mask.masking.patch_grid import grid_shape, is_channels_first
from keras_cluster_mask.masking.statistics import (
    check_tokens_do_not_matter,
    patch_size_of,
    select_patches,
    tokens_of,
)

# The metrics of a `ContrastiveModel` that are shown, and how they are called.
ACCURACIES = {
    "image_to_text_accuracy": "image to text",
    "text_to_image_accuracy": "text to image",
}
LEFT_OUT = 0.88  # The grey of patches that are left out, on a scale of 0 to 1.


def plot_masks(images, masking, noise=None, seed=0, patch_size=None, embed=None):
    """Shows what a masking leaves out.

    For a cluster masking, five images a row: the image; random masking at the same
    budget; cluster masking; the clusters, coloured by anchor; and the similarity of
    each patch to the nearest anchor. Anchors are outlined. For any other masking, the
    image and the patches that are kept.

    Within a `ContrastiveModel` uint8 images are normalised as the model does, so the
    masks are those of its training. The masking's random state is left as it is.

    Example:

    ```python
    masking = kcm.ClusterMasking(patch_size=8, mask_ratio=0.5)
    images = np.random.randint(0, 256, (2, 64, 64, 3)).astype("uint8")
    figure = kcm.visualization.plot_masks(images, masking)
    ```

    Args:
        images: `(batch, H, W, C)` array, uint8, or floats in `[0, 1]`. A row
            of the figure each.
        masking: A `PatchMasking`.
        noise: `(batch, N)` float32 array in `[0, 1)`. Drawn if not given.
        seed: Integer, for the noise.
        patch_size: As in `kcm.masking.masking_statistics`: needed by a masking
            without one, as `RandomMasking`.
        embed: As in `kcm.masking.masking_statistics`: needed by a masking that looks
            at tokens, such as the `embed_patches` of what `kcm.with_masking` returns.

    Returns:
        A `matplotlib.figure.Figure`; save it with `figure.savefig(path)`.

    Raises:
        ValueError: If the patch size, the tokens or the threshold that the masking
            needs are missing, or if the images do not fit the patch size.
    """
    images = np.asarray(images)
    patch_size = patch_size_of(masking, patch_size)
    masking.check_ready()
    pixels = masking.prepare_pixels(ops.convert_to_tensor(images))
    grid = grid_shape(pixels.shape, patch_size, masking.data_format)
    tokens = tokens_of(pixels, masking, grid, embed)
    if tokens is not None and embed is None:
        check_tokens_do_not_matter(masking, pixels, tokens, grid)
    num_patches = grid[0] * grid[1]
    if noise is None:
        noise = np.random.default_rng(seed).random((len(images), num_patches))
    noise = ops.convert_to_tensor(noise, dtype="float32")
    kept = _kept(*select_patches(masking, pixels, tokens, noise), num_patches)

    shown = _for_display(images, masking.data_format)
    grid = _Grid(grid, patch_size)
    if isinstance(masking, ClusterMasking):
        return _plot_clusters(shown, grid, kept, masking, pixels, tokens, noise)
    figure, axes = _axes(len(images), 2)
    for row, image, stays in zip(axes, shown, kept):
        row[0].imshow(image)
        row[1].imshow(grid.leave_out(image, stays))
    for axis, title in zip(axes[0], ("image", type(masking).__name__)):
        axis.set_title(title, fontsize=11)
    return figure


def _plot_clusters(shown, grid, kept, masking, pixels, tokens, noise):
    num_patches = kept.shape[1]
    at_random = RandomMasking(1 - masking.num_kept(num_patches) / num_patches, 0)
    random_kept = _kept(
        *at_random.select(tokens=ops.zeros((*kept.shape, 1)), noise=noise), num_patches
    )
    anchors = masking.draw_anchors(noise)
    to_anchors = ops.convert_to_numpy(
        masking.similarity_to_anchors(pixels, anchors, tokens)
    )
    anchors = ops.convert_to_numpy(anchors)

    titles = ("image", "random masking", "cluster masking", "clusters", "similarity")
    figure, axes = _axes(len(shown), len(titles))
    for row, image in zip(axes, range(len(shown))):
        nearest = to_anchors[image].argmax(axis=0)
        colors = _anchor_colors(len(anchors[image]))[nearest]
        colors[kept[image]] = np.nan
        row[0].imshow(shown[image])
        row[1].imshow(grid.leave_out(shown[image], random_kept[image]))
        row[2].imshow(grid.leave_out(shown[image], kept[image]))
        row[3].imshow(grid.tint(shown[image], colors))
        row[4].imshow(shown[image].mean(axis=-1), cmap="gray", vmin=0, vmax=1)
        heat = row[4].imshow(
            grid.spread(to_anchors[image].max(axis=0)),
            cmap="inferno", vmin=-0.2, vmax=1, alpha=0.75,
        )  # fmt: skip
        for axis in row[2:]:
            for anchor in anchors[image]:
                axis.add_patch(grid.outline(anchor))
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=11)
    figure.colorbar(heat, ax=axes[:, -1].tolist(), shrink=0.85, pad=0.03)
    return figure


def plot_history(history, validation_freq=None):
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


def plot_masking_statistics(statistics):
    """Shows what a masking does to the images of a data set.

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


def plot_retrieval(queries, images, similarity, k=5):
    """Shows the images that match text queries best.

    Args:
        queries: List of strings, a row of the figure each.
        images: `(images, H, W, C)` array, uint8, or floats in `[0, 1]`.
        similarity: `(queries, images)` array.
        k: Integer. How many images to show per query.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    similarity = np.asarray(similarity)
    if similarity.shape != (len(queries), len(images)):
        raise ValueError(
            "`similarity` must have shape (queries, images), "
            f"({len(queries)}, {len(images)}). "
            f"Received: similarity.shape={similarity.shape}"
        )
    shown = _for_display(np.asarray(images))
    figure, axes = _axes(len(queries), k, size=1.15, left=2.6)
    for row, query, scores in zip(axes, queries, similarity):
        row[0].text(
            -0.12, 0.5, query, transform=row[0].transAxes, ha="right", va="center",
            fontsize=10,
        )  # fmt: skip
        for axis, index in zip(row, np.argsort(-scores, kind="stable")[:k]):
            axis.imshow(shown[index])
            axis.set_title(f"{scores[index]:.2f}", fontsize=7, pad=2)
    return figure


class _Grid:
    """The patch grid of an image, and drawing on it."""

    def __init__(self, grid, patch_size):
        self.patch_size = patch_size
        self.rows, self.columns = grid

    def spread(self, values):
        """Turns `(N, ...)` values per patch into values per pixel."""
        values = values.reshape(self.rows, self.columns, *values.shape[1:])
        return values.repeat(self.patch_size[0], 0).repeat(self.patch_size[1], 1)

    def leave_out(self, image, kept):
        return np.where(self.spread(kept)[..., None], image, LEFT_OUT)

    def tint(self, image, colors):
        """Colours the patches whose colour is not NaN, and pales the others."""
        colors = self.spread(colors)
        gray = image.mean(axis=-1, keepdims=True)
        tinted = 0.35 * gray + 0.65 * colors
        return np.where(np.isnan(colors), 0.5 + 0.5 * image, tinted)

    def outline(self, patch):
        height, width = self.patch_size
        corner = (patch % self.columns * width, patch // self.columns * height)
        return Rectangle(
            np.array(corner) - 0.5, width, height,
            fill=False, edgecolor="red", linewidth=1.6,
        )  # fmt: skip


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


def _kept(indices, visible, num_patches):
    """`(batch, N)` booleans, true for the patches that stay and are seen."""
    indices, visible = ops.convert_to_numpy(indices), ops.convert_to_numpy(visible)
    kept = np.zeros((len(indices), num_patches), dtype=bool)
    np.put_along_axis(kept, indices, visible, axis=1)
    return kept


def _anchor_colors(count):
    return matplotlib.colormaps["tab10"](np.arange(count) % 10)[:, :3]


def _for_display(images, data_format=None):
    """Floats in `[0, 1]`, channels last, three of them."""
    if is_channels_first(data_format):
        images = np.moveaxis(images, 1, -1)
    if images.dtype == np.uint8:
        images = images / 255.0
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    return np.clip(images[..., :3].astype("float32"), 0, 1)


def _axes(rows, columns, size=2.1, left=0.0):
    figure = Figure(
        figsize=(left + columns * size + 0.2, rows * size + 0.3), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes
