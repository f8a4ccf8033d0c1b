import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.masking.edge_masking import edge_map
from tests.masking import masking_reference as reference
from tests.masking.images import CLEAR, assert_selects, numpy
from tests.masking.test_kmeans_masking import GEOMETRIES, case

# With and without transport, of each way to take seeds.
OPTIONS = [
    {"edges": edges, "transport": transport}
    for transport in (True, False)
    for edges in ("protect", "released", None)
]


def test_selects_as_the_reference_wherever_every_decision_is_clear():
    shares = []
    for seed, geometry in enumerate(GEOMETRIES):
        rows, columns, patch_size, _, data_format = geometry
        images, noise, tokens = case(*geometry, seed)
        options = {
            "mask_ratio": (0.5, 0.3, 0.75)[seed % 3],
            "seed_ratio": (0.05, 0.1, 0.3)[seed % 3],
            "threshold": (0.5, 0.2)[seed % 2],
            **OPTIONS[seed % len(OPTIONS)],
        }
        weight = (0.0, 0.3, 0.0, 1.0)[seed % 4]
        masking = kcm.EdgeMasking(
            patch_size=patch_size,
            embedding_weight=weight,
            data_format=data_format,
            **options,
        )
        x = reference.patches(images, patch_size, data_format)
        similarity = reference.pairwise_similarity(
            images,
            patch_size,
            data_format=data_format,
            tokens=tokens[:, 1:],
            weight=weight,
        )
        expected, gaps = reference.select_edges(
            x, similarity, noise, (rows, columns), **options
        )
        clear = gaps > CLEAR
        inputs = dict(images=images, tokens=tokens, noise=noise)
        assert_selects(masking, expected, clear, compiled=True, **inputs)
        shares.append(clear.mean())
    # Of 200 cases.
    assert np.mean(shares) > 0.95


@pytest.mark.any_backend
def test_rounding_errors_are_no_edges():
    # The same pixels in another order: their mean differs in its last bits alone.
    rng = np.random.default_rng(7)
    pixels = np.tile(rng.random(192), (8, 24, 1))
    patches = rng.permuted(pixels, axis=-1).astype("float32")
    assert len(np.unique(patches.mean(axis=-1))) > 1
    got = numpy(edge_map(ops.convert_to_tensor(patches), (6, 4)))
    np.testing.assert_array_equal(got, 0.0)


@pytest.mark.any_backend
def test_zero_tokens_are_like_none_even_themselves():
    # Sinkhorn's algorithm has nothing to divide by there.
    images, noise, tokens = case(*GEOMETRIES[0], seed=6)
    tokens[:, 1:3], tokens[:, 3:] = 0.0, 1.0
    masking = kcm.EdgeMasking(
        patch_size=4, seed_ratio=0.2, edges=None, embedding_weight=1.0
    )
    masked = numpy(masking.score(noise, images, tokens)) < 0.0
    seeds = numpy(masking.draw_seeds(ops.convert_to_tensor(noise), None, None))
    has_alike = (seeds >= 2).any(axis=1)
    assert not masked[:, :2].any()
    np.testing.assert_array_equal(masked[:, 2:].all(axis=1), has_alike)
    np.testing.assert_array_equal(masked[:, 2:].any(axis=1), has_alike)
