"""Plots of masks, training runs and retrievals, with matplotlib."""

import math
import numbers

import matplotlib
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from keras_cluster_mask.masking import (
    ClusterMasking,
    MaskingStatistics,
    PatchMasking,
    RandomMasking,
)
from keras_cluster_mask.masking.patch_grid import (
    grid_shape,
    is_channels_first,
    standardize_patch_size,
)
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
    """Shows what a masking leaves out, or compares several on the same images.

    For one cluster masking, five images a row: the image; random masking at the same
    budget; cluster masking; the clusters, coloured by anchor; and the similarity of
    each patch to the nearest anchor. Anchors are outlined. For any other masking, and
    for several, the image and the patches that each masking keeps.

    All maskings get the same noise. Within a `ContrastiveModel` uint8 images are
    normalised as the model does, so the masks are those of its training. The random
    state of a masking is left as it is.

    Example:

    ```python
    masking = kcm.ClusterMasking(patch_size=8, mask_ratio=0.5)
    images = np.random.randint(0, 256, (2, 64, 64, 3)).astype("uint8")
    figure = kcm.visualization.plot_masks(images, masking)

    maskings = {"random": kcm.RandomMasking(0.5), "by cluster": masking}
    figure = kcm.visualization.plot_masks(images, maskings)
    ```

    Args:
        images: `(batch, H, W, C)` array, uint8, or floats in `[0, 1]`. A row
            of the figure each.
        masking: A `PatchMasking`. Or several, a column of the figure each: a dictionary
            from titles to maskings, or a list, which takes the names of their classes
            as titles.
        noise: `(batch, N)` float32 array in `[0, 1)`. Drawn if not given.
        seed: Integer, for the noise.
        patch_size: As in `kcm.masking.masking_statistics`: needed if no masking has
            one, as `RandomMasking`. All maskings have the same.
        embed: As in `kcm.masking.masking_statistics`: needed if a masking looks at
            tokens, such as the `embed_patches` of what `kcm.with_masking` returns.

    Returns:
        A `matplotlib.figure.Figure`; save it with `figure.savefig(path)`.

    Raises:
        ValueError: If the patch size, the tokens or the threshold that a masking
            needs are missing, if the images do not fit the patch size, or if maskings
            differ in patch size or data format.
    """
    titles, maskings = _titles_and_maskings(masking)
    images = np.asarray(images)
    own_patch_size = _common("patch_size", maskings, standardize_patch_size)
    patch_size = own_patch_size if patch_size is None else patch_size
    for each in maskings:
        patch_size = patch_size_of(each, patch_size)
    data_format = _common("data_format", maskings)
    grid = _Grid(grid_shape(images.shape, patch_size, data_format), patch_size)
    if noise is None:
        noise = np.random.default_rng(seed).random((len(images), grid.num_patches))
    noise = ops.convert_to_tensor(noise, dtype="float32")
    inputs = [_inputs(each, images, grid, embed) for each in maskings]
    kept = [_kept(each, *inputs[i], noise) for i, each in enumerate(maskings)]

    shown = _for_display(images, data_format)
    if isinstance(masking, ClusterMasking):
        return _plot_clusters(shown, grid, kept[0], masking, *inputs[0], noise)
    figure, axes = _axes(len(images), len(titles) + 1, ("image", *titles))
    for index, row in enumerate(axes):
        row[0].imshow(shown[index])
        for axis, stays in zip(row[1:], kept):
            axis.imshow(grid.leave_out(shown[index], stays[index]))
    return figure


def _titles_and_maskings(masking):
    """The titles and the maskings of the columns, for one masking or several."""
    titles, maskings = None, masking
    if isinstance(masking, PatchMasking):
        maskings = [masking]
    elif isinstance(masking, dict):
        titles, maskings = [*masking], [*masking.values()]
    is_list = isinstance(maskings, list | tuple) and len(maskings) > 0
    if not is_list or not all(isinstance(each, PatchMasking) for each in maskings):
        raise ValueError(
            "`masking` must be a `PatchMasking`, a list of them, or a dictionary from "
            f"titles to them. Received: masking={masking!r}"
        )
    return titles or [type(each).__name__ for each in maskings], maskings


def _common(name, maskings, standardize=str):
    """The one value of an attribute in the maskings that have one, or `None`."""
    values = [getattr(each, name) for each in maskings]
    values = {standardize(value) for value in values if value is not None}
    if len(values) > 1:
        raise ValueError(
            f"`masking` must be maskings of one `{name}`, as they are compared on the "
            f"same patches: plot the others separately. Received: {name}s of "
            f"{' and '.join(map(repr, sorted(values)))}"
        )
    return values.pop() if values else None


def _inputs(masking, images, grid, embed):
    """The pixels and the tokens that a masking gets in training."""
    if masking.grid not in (None, grid.shape):
        raise ValueError(
            f"`grid` of the {type(masking).__name__} must be that of the patches of "
            f"`images`, {grid.shape}, or None. Received: grid={masking.grid}, "
            f"images.shape={images.shape}, patch_size={grid.patch_size}"
        )
    masking.check_ready()
    pixels = masking.prepare_pixels(ops.convert_to_tensor(images))
    tokens = tokens_of(pixels, masking, grid.shape, embed)
    if tokens is not None and embed is None:
        check_tokens_do_not_matter(masking, pixels, tokens, grid.shape)
    return pixels, tokens


def _plot_clusters(shown, grid, kept, masking, pixels, tokens, noise):
    at_random = RandomMasking(1 - masking.num_kept(grid.num_patches) / grid.num_patches)
    random_kept = _kept(at_random, pixels, ops.zeros((*kept.shape, 1)), noise)
    anchors = masking.draw_anchors(noise)
    to_anchors = ops.convert_to_numpy(
        masking.similarity_to_anchors(pixels, anchors, tokens)
    )
    anchors = ops.convert_to_numpy(anchors)

    titles = ("image", "random masking", "cluster masking", "clusters", "similarity")
    figure, axes = _axes(len(shown), len(titles), titles)
    for index, (row, image) in enumerate(zip(axes, shown)):
        nearest = to_anchors[index].argmax(axis=0)
        colors = matplotlib.colormaps["tab10"](nearest % 10)[:, :3]
        colors[kept[index]] = np.nan
        row[0].imshow(image)
        row[1].imshow(grid.leave_out(image, random_kept[index]))
        row[2].imshow(grid.leave_out(image, kept[index]))
        row[3].imshow(grid.tint(image, colors))
        row[4].imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
        heat = row[4].imshow(
            grid.spread(to_anchors[index].max(axis=0)),
            cmap="inferno", vmin=-0.2, vmax=1, alpha=0.75,
        )  # fmt: skip
        for axis in row[2:]:
            for anchor in anchors[index]:
                axis.add_patch(grid.outline(anchor))
    figure.colorbar(heat, ax=axes[:, -1].tolist(), shrink=0.85, pad=0.03)
    return figure


def plot_history(history, validation_freq=None):
    """Shows the curves of a training run: loss, and accuracy within the batch.

    Of a Keras model other than a `ContrastiveModel`, loss and all metrics.

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
    known = getattr(history, "epoch", range(len(logs[names[0]])))
    epochs = [epoch + 1 for epoch in known]
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

    def __init__(self, shape, patch_size):
        self.shape, self.patch_size = shape, patch_size
        self.num_patches = math.prod(shape)

    def spread(self, values):
        """Turns `(N, ...)` values per patch into values per pixel."""
        values = values.reshape(*self.shape, *values.shape[1:])
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
        row, column = divmod(patch, self.shape[1])
        return Rectangle(
            (column * width - 0.5, row * height - 0.5), width, height,
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


def _kept(masking, pixels, tokens, noise):
    """`(batch, N)` booleans, true for the patches that stay and are seen."""
    indices, visible = select_patches(masking, pixels, tokens, noise)
    kept = np.zeros(tuple(noise.shape), dtype=bool)
    np.put_along_axis(
        kept, ops.convert_to_numpy(indices), ops.convert_to_numpy(visible), axis=1
    )
    return kept


def _for_display(images, data_format=None):
    """Floats in `[0, 1]`, channels last, three of them."""
    if is_channels_first(data_format):
        images = np.moveaxis(images, 1, -1)
    if images.dtype == np.uint8:
        images = images / 255.0
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    return np.clip(images[..., :3].astype("float32"), 0, 1)


def _axes(rows, columns, titles=(), size=2.1, left=0.0):
    """A figure of images, with titles of the columns."""
    figure = Figure(
        figsize=(left + columns * size + 0.2, rows * size + 0.3), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=11)
    return figure, axes
