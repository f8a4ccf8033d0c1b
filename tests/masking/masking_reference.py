"""Cluster masking in NumPy and SciPy, the reference the layers are tested against.

The algorithm is that of Wei, Pan and Owens, "Efficient Vision-Language Pre-training
by Cluster Masking", CVPR 2024, arXiv 2405.08815, with the exact-budget variant, in
which the clusters grow until a given number of patches is masked.

Written from the description of the algorithm alone, and to be read rather than to be
fast. Nothing of the library is imported. Every decision is made in float64, on images,
tokens and noise that are first cast to float32, which is what a layer receives.

Names: N patches per image, n values per patch, A anchors, K kept patches, S the
similarity of two patches, s_j the highest similarity of patch j to any anchor.
Selections are a pair: `indices` (batch, K) int32, ascending, and `visible` (batch, K)
bool, false for the kept patches that are only padding.
"""

import numpy as np
from scipy import ndimage

SIMILARITY_STEP = 2.0**-12
SMALLEST_NOISE = 1e-12


def _float64(values):
    """The float32 values of an array, as float64."""
    return np.asarray(values).astype(np.float32).astype(np.float64)


# === Patches ===


def patches(images, patch_size, data_format="channels_last"):
    """Cut images into patches: (batch, N, n), row-major (arXiv 2405.08815).

    The values of a patch are ordered (row, column, channel) in both data formats.
    """
    images = _float64(images)
    if data_format == "channels_first":
        images = np.moveaxis(images, 1, -1)
    if isinstance(patch_size, int):
        patch_size = (patch_size, patch_size)
    patch_height, patch_width = patch_size

    batch, height, width, _ = images.shape
    cut = [
        images[:, top : top + patch_height, left : left + patch_width].reshape(
            batch, -1
        )
        for top in range(0, height, patch_height)
        for left in range(0, width, patch_width)
    ]
    return np.stack(cut, axis=1)


# === Similarity ===


def _unit(vectors):
    norm = np.sqrt(np.sum(vectors**2, axis=-1, keepdims=True))
    return vectors / np.where(norm == 0.0, 1.0, norm)


def comparable_patches(
    images, patch_size, data_format="channels_last", tokens=None, weight=0.0
):
    """Unit vectors whose dot products are S: (batch, N, n + 1 + dim).

    Patches are mean-free, in units of the contrast r of the image. Each gets a
    coordinate of its own size e, which flat patches share: they are alike, and nothing
    is divided by 0. Tokens, without prefix, are mixed in by weight, the embedding
    variant of arXiv 2405.08815. A token of zeros is like none, not even itself.
    """
    x = patches(images, patch_size, data_format)
    r = np.maximum(x.std(axis=(1, 2)), 0.01 * np.abs(x).max(axis=(1, 2)))
    r = np.maximum(r, 1e-12)[:, None, None]
    centered = (x - x.mean(axis=-1, keepdims=True)) / r
    e = np.full((*centered.shape[:2], 1), 1e-3 * np.sqrt(x.shape[-1]))
    pixels = _unit(np.concatenate([centered, e], axis=-1))
    if weight == 0.0:
        return pixels
    parts = [np.sqrt(1.0 - weight) * pixels, np.sqrt(weight) * _unit(_float64(tokens))]
    return np.concatenate(parts, axis=-1)


def pairwise_similarity(images, patch_size, **options):
    """Unrounded S of the patches, or of their mix with tokens: (batch, N, N)."""
    x = comparable_patches(images, patch_size, **options)
    return x @ np.swapaxes(x, 1, 2)


def round_similarity(s):
    """The nearest multiple of 2^-12, ties to even: rounding noise never decides.

    A detail of this library, not of arXiv 2405.08815.
    """
    return np.round(np.float64(s) / SIMILARITY_STEP) * SIMILARITY_STEP


# === Counts and anchors ===


def anchor_count(N, anchor_ratio):
    """The number of anchors A, at least 1 (arXiv 2405.08815)."""
    return max(1, N - int(N * (1.0 - anchor_ratio) + 1e-6))


def kept_count(N, ratio):
    """The number of kept patches K, at least 1 (arXiv 2405.08815).

    `ratio` is the masked share: `mask_ratio`, or `min_mask_ratio` with a threshold.
    """
    return max(1, int(N * (1.0 - ratio) + 1e-6))


def anchors(noise, anchor_ratio):
    """Random anchors: the A patches with the smallest noise (arXiv 2405.08815).

    Returns (batch, A) indices, smallest noise first, ties by lower index.
    """
    A = anchor_count(noise.shape[1], anchor_ratio)
    return np.argsort(noise, axis=1, kind="stable")[:, :A].astype(np.int32)


def highest_similarity(pairwise, anchors):
    """s_j, the highest S(anchor, j) over the anchors: (batch, N) (arXiv 2405.08815)."""
    return np.stack(
        [image[rows].max(axis=0) for image, rows in zip(pairwise, np.asarray(anchors))]
    )


# === Selection ===


def _order(cost, noise):
    """Patches of one image, lowest cost first, then larger noise, then lower index."""
    return np.lexsort((-noise, cost))


def _cost(s, noise, softness):
    """What budget mode minimizes: s_j - softness * g_j, g_j a Gumbel variable."""
    if softness == 0.0:
        return s
    g = -np.log(-np.log(np.maximum(noise, SMALLEST_NOISE)))
    if np.isinf(softness):
        return -g
    return s - softness * g


def select_budget(s, noise, mask_ratio, softness=0.0):
    """Exact budget: keep the K patches least similar to any anchor.

    The clusters of arXiv 2405.08815, grown until N - K patches are masked. `softness`
    adds Gumbel noise to the order: 0 is pure clusters, infinity is random masking.
    """
    cost = _cost(s, _float64(noise), softness)
    return _keep_highest(-cost, noise, kept_count(noise.shape[1], mask_ratio))


def select_threshold(s, noise, min_mask_ratio, threshold, hide_padding=True):
    """Threshold: patch j is masked when s_j > threshold (arXiv 2405.08815).

    K patches are kept. Of too many unmasked ones those with the smallest noise go; too
    few are filled up with the masked ones of the largest noise, which stay invisible
    unless `hide_padding` is false. If all are masked, the one of the lowest s is not.
    """
    unmasked = s <= np.float32(threshold)
    for s_image, noise_image, row in zip(s, noise, unmasked):
        if not row.any():
            row[_order(s_image, noise_image)[0]] = True
    K = kept_count(noise.shape[1], min_mask_ratio)
    indices, visible = _keep_highest(unmasked.astype(float), noise, K)
    if hide_padding:
        visible = np.take_along_axis(unmasked, indices, axis=1)
    return indices, visible


def select_random(noise, mask_ratio):
    """Random masking: keep the K patches with the largest noise.

    The baseline that arXiv 2405.08815 compares with.
    """
    return _keep_highest(noise, noise, kept_count(noise.shape[1], mask_ratio))


# === How safe a decision is ===


def gap_at_cut(s_unrounded, noise, K, softness=0.0):
    """Distance between the last kept and the first dropped patch in budget mode.

    (batch,), from the unrounded s; infinity where K = N. Float32 backends must agree
    on a selection of arXiv 2405.08815's clusters only where this is clearly above the
    rounding step. With K = 1 it also covers the one patch that a threshold below every
    s leaves visible.
    """
    gaps = []
    for s_image, noise_image in zip(s_unrounded, _float64(noise)):
        cost = _cost(s_image, noise_image, softness)
        in_order = np.append(cost[_order(cost, noise_image)], np.inf)
        gaps.append(in_order[K] - in_order[K - 1])
    return np.array(gaps)


def margin_at_threshold(s_unrounded, threshold):
    """Smallest |s_j - threshold| of each image: (batch,).

    The counterpart of `gap_at_cut` for the threshold of arXiv 2405.08815.
    """
    return np.abs(s_unrounded - np.float32(threshold)).min(axis=1)


# === Strategies that depend on position alone ===


def _keep_highest(score, noise, K):
    """The K patches of the highest score; ties go to larger noise, then lower index."""
    indices = [sorted(_order(-s, row)[:K]) for s, row in zip(score, noise)]
    return np.array(indices, np.int32), np.ones((len(noise), K), bool)


def centered_score(noise, grid, variance):
    """Noise plus the density of a 2-D normal at each patch (GLIP, arXiv 2403.15837).

    The centers of the outer patches lie at -1 and 1 on each axis, and those of a single
    row or column at 0.
    """
    y, x = np.meshgrid(
        *(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in grid), indexing="ij"
    )
    density = np.exp(-(x * x + y * y) / (2 * variance)) / (2 * np.pi * variance)
    return _float64(noise) + density.ravel()


def select_centered(noise, grid, mask_ratio, variance):
    """Centered masking: the K patches of the highest score (arXiv 2403.15837)."""
    K = kept_count(noise.shape[1], mask_ratio)
    return _keep_highest(centered_score(noise, grid, variance), noise, K)


def select_grid(noise, grid, window):
    """Grid masking: the patch of the largest noise of each window (CLIPA, 2305.07017).

    Ties go to the patch that comes first in its window, row by row.
    """
    rows, columns = grid
    numbers = np.arange(rows * columns).reshape(grid)
    windows = [
        numbers[top : top + window, left : left + window].ravel()
        for top in range(0, rows, window)
        for left in range(0, columns, window)
    ]
    kept = np.stack([x[noise[:, x].argmax(axis=1)] for x in windows], axis=1)
    return np.sort(kept).astype(np.int32), np.ones(kept.shape, bool)


def block_sides(grid, K):
    """The least square that holds K patches, or as near to one as the grid allows."""
    rows, columns = grid
    side = int(np.ceil(np.sqrt(K)))
    if side > rows:
        return rows, -(-K // rows)
    if side > columns:
        return -(-K // columns), columns
    return side, side


def select_block(noise, grid, mask_ratio):
    """Block masking: K patches of a block at a uniform place (CLIPA, 2305.07017).

    The noise of the first patch draws the place. Where the block holds more than K
    patches, those of the smallest low bits of the noise go.
    """
    noise = _float64(noise)
    rows, columns = grid
    K = kept_count(rows * columns, mask_ratio)
    height, width = block_sides(grid, K)
    places = [*np.ndindex(rows - height + 1, columns - width + 1)]
    numbers = np.arange(rows * columns).reshape(grid)
    score = np.full(noise.shape, -1.0)
    for b, row in enumerate(noise):
        top, left = places[int(row[0] * len(places))]
        block = numbers[top : top + height, left : left + width]
        score[b, block] = np.modf(row[block] * 4096)[0]
    return _keep_highest(score, noise, K)


# === Strategies that compare all patches ===


def kmeans_labels(x, noise, clusters=8, iterations=5):
    """Spherical k-means of each image from random seeds (after arXiv 2405.08815).

    Returns the cluster of each patch (batch, N), numbered by the noise of its seed, and
    how clear the least clear assignment of each image was (batch,).
    """
    labels, clear = [], []
    for image, row in zip(x, noise):
        centers = image[np.argsort(row, kind="stable")[:clusters]]
        gap = np.inf
        for _ in range(iterations + 1):
            similarity = image @ centers.T
            label = similarity.argmax(axis=1)
            if len(centers) > 1:
                second, first = np.sort(similarity, axis=1)[:, -2:].T
                gap = min(gap, (first - second).min())
            last = label
            for c in range(len(centers)):
                total = image[label == c].sum(axis=0)
                if np.linalg.norm(total) > 1e-6:
                    centers[c] = total / np.linalg.norm(total)
        labels.append(last)
        clear.append(gap)
    return np.array(labels), np.array(clear)


def select_kmeans(labels, noise, mask_ratio):
    """Clusters leave in the order of their numbers; the last one is cut by noise."""
    K = kept_count(noise.shape[1], mask_ratio)
    return _keep_highest(labels, noise, K)


def edge_map(x, grid):
    """Sobel edges of the mean gray levels of patches in [0, 1] (arXiv 2503.17080).

    Beyond the border lies the mean gray level of the image.
    """
    edges = []
    for image in x:
        gray = image.mean(axis=-1).reshape(grid)
        along = (ndimage.sobel(gray - gray.mean(), i, mode="constant") for i in (0, 1))
        edges.append(np.hypot(*along).ravel())
    edges = np.stack(edges)
    edges -= edges.min(axis=1, keepdims=True)
    floor = np.maximum(0.01 * np.abs(x).max(axis=(1, 2)), 1e-12)
    return edges / np.maximum(edges.max(axis=1), floor)[:, None]


def sinkhorn(similarity, rounds=50, eps=1e-3):
    """Divides the non-negative part by the sums of columns and of rows, in turn."""
    s = np.maximum(similarity, 0.0)
    for _ in range(rounds):
        s = s / (s.sum(axis=1, keepdims=True) + eps)
        s = s / (s.sum(axis=2, keepdims=True) + eps)
    return s


def select_edges(
    x, similarity, noise, grid, mask_ratio, seed_ratio, threshold, edges, transport
):
    """Masks look-alikes of seeds; the budget is filled by noise (arXiv 2503.17080).

    Returns the selection and how clear the least clear decision of each image was.
    """
    noise = _float64(noise)
    batch, N = noise.shape
    K, A = kept_count(N, mask_ratio), anchor_count(N, seed_ratio)
    cost = {
        "protect": lambda: edge_map(x, grid),
        "released": lambda: -np.modf(noise * 4096)[0],
        None: lambda: np.zeros_like(noise),
    }[edges]()
    if transport:
        similarity = similarity + sinkhorn(similarity)
    score, clear = np.zeros((batch, N)), np.full(batch, np.inf)
    for b in range(batch):
        order = _order(cost[b], -noise[b])
        near = similarity[b, order[:A]].max(axis=0)
        score[b] = np.where(near > threshold, -1.0, 0.0)
        clear[b] = np.abs(near - threshold).min()
        if edges == "protect" and A < N:
            clear[b] = min(clear[b], cost[b, order[A]] - cost[b, order[A - 1]])
    return _keep_highest(score, noise, K), clear
