import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.masking import masking_reference as reference
from tests.masking.images import (
    CLEAR,
    assert_selects,
    draw_noise,
    numpy,
    paper,
    textured,
    tokens_of,
)

ROWS = 25
# Rows, columns, patch size, channels and data format. Odd, even, and not square.
GEOMETRIES = [
    (3, 5, 4, 3, "channels_last"),
    (5, 3, (4, 2), 3, "channels_first"),
    (4, 4, 2, 1, "channels_last"),
    (1, 9, (2, 4), 4, "channels_last"),
    (2, 7, 4, 1, "channels_first"),
    (3, 3, (6, 4), 3, "channels_last"),
    (4, 5, 2, 3, "channels_last"),
    (7, 2, 4, 3, "channels_last"),
]


def case(rows, columns, patch_size, channels, data_format, seed):
    """Random images, noise and tokens of one geometry."""
    rng = np.random.default_rng(seed)
    height, width = np.broadcast_to(patch_size, 2)
    size = rows * height, columns * width
    images = textured(rng, ROWS, *size, channels, fmt=data_format)
    noise = draw_noise(rng, ROWS, rows * columns)
    return images, noise, tokens_of(ROWS, 1 + rows * columns, dim=16, seed=seed)


def test_selects_as_the_reference_wherever_every_assignment_is_clear():
    shares = []
    for seed, geometry in enumerate(GEOMETRIES):
        *_, patch_size, _, data_format = geometry
        images, noise, tokens = case(*geometry, seed)
        clusters, iterations = (8, 2, 4, 3, 1)[seed % 5], (5, 1, 3)[seed % 3]
        mask_ratio, weight = (0.5, 0.3, 0.75)[seed % 3], (0.0, 0.3, 0.0, 1.0)[seed % 4]
        masking = kcm.KMeansMasking(
            mask_ratio,
            patch_size=patch_size,
            num_clusters=clusters,
            iterations=iterations,
            embedding_weight=weight,
            data_format=data_format,
        )
        x = reference.comparable_patches(
            images, patch_size, data_format, tokens[:, 1:], weight
        )
        labels, gaps = reference.kmeans_labels(x, noise, clusters, iterations)
        clear = gaps > CLEAR
        expected = reference.select_kmeans(labels, noise, mask_ratio)
        inputs = dict(images=images, tokens=tokens, noise=noise)
        assert_selects(masking, expected, clear, compiled=True, **inputs)
        shares.append(clear.mean())
    # Of 200 cases.
    assert np.mean(shares) > 0.95


@pytest.mark.any_backend
def test_flat_patches_of_many_gray_levels_share_a_cluster():
    # Rounding errors, here larger ones, must not decide which of several seeds.
    rng = np.random.default_rng(5)
    images = paper(rng, ROWS, 6, 4, (4, 4))
    images += 3e-6 * rng.normal(size=images.shape).astype("float32")
    images[:, :8] = rng.random((ROWS, 8, 16, 3))
    noise = draw_noise(np.random.default_rng(7), ROWS, 24)
    flat = numpy(kcm.KMeansMasking(patch_size=4).score(noise, images))[:, 8:]
    seeds = np.argsort(noise, axis=1)[:, :8]
    assert np.all((seeds >= 8).sum(axis=1) > 1)
    np.testing.assert_array_equal(flat, np.broadcast_to(flat[:, :1], flat.shape))
