"""What every masking must satisfy."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from tests.helpers import (
    assert_same_values,
    to_numpy,
    value_and_gradients,
    values,
)
from tests.masking.images import (
    FALSE_ALARM,
    chi_square,
    draw_noise,
    dtype_of,
    numpy,
    output_mask,
    photographs,
    ramp,
    tokens_of,
)

ROWS, N = 32, 24
# 4 x 6 patches of 4 x 4 pixels.
IMAGES = photographs(16, 24, ROWS)
NOISE = draw_noise(np.random.default_rng(0), ROWS, N)


def by_threshold(**options):
    options = {"min_mask_ratio": 0.3, "threshold": 0.14, **options}
    return kcm.ClusterMasking(patch_size=4, **options)


# How a masking is made, and how many of the patches it keeps.
STRATEGIES = {
    "random": (kcm.RandomMasking, 12),
    "centered": (kcm.CenteredMasking, 12),
    "grid": (kcm.GridMasking, 6),
    "block": (kcm.BlockMasking, 12),
    "cluster": (lambda **options: kcm.ClusterMasking(patch_size=4, **options), 12),
    "soft": (
        lambda **options: kcm.ClusterMasking(patch_size=4, softness=0.2, **options),
        12,
    ),
    "threshold": (by_threshold, 16),
    "threshold_shown": (lambda **x: by_threshold(hide_padding=False, **x), 16),
    "kmeans": (lambda **options: kcm.KMeansMasking(patch_size=4, **options), 12),
    "edge": (lambda **options: kcm.EdgeMasking(patch_size=4, **options), 12),
}
SIMILARITY = ["cluster", "soft", "kmeans", "edge"]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def make(strategy, num_prefix_tokens=1, **options):
    made, _ = STRATEGIES[strategy]
    return made(num_prefix_tokens=num_prefix_tokens, **options)


@every_strategy
def test_keeps_tokens_in_their_order_behind_the_prefix(strategy):
    num_kept = STRATEGIES[strategy][1]
    for prefix, dtype in ((0, "float32"), (1, "float16"), (3, "bfloat16")):
        masking = make(strategy, prefix)
        tokens = tokens_of(ROWS, prefix + N, dtype=dtype)
        state = values([masking.seed_generator.state])
        kept = masking(tokens, images=IMAGES, training=True, noise=NOISE)
        indices, visible = numpy(*masking.select(IMAGES, tokens, NOISE))
        # All the randomness is in the noise.
        assert_same_values([masking.seed_generator.state], state)
        assert indices.shape == visible.shape == (ROWS, num_kept)
        assert indices.dtype == np.int32
        assert visible.dtype == bool
        assert indices.min() >= 0
        assert indices.max() < N
        assert np.all(np.diff(indices, axis=1) > 0)

        assert dtype_of(kept) == dtype
        patches = np.take_along_axis(tokens[:, prefix:], indices[:, :, None], axis=1)
        expected = np.concatenate([tokens[:, :prefix], patches], axis=1)
        np.testing.assert_array_equal(to_numpy(kept), expected.astype("float32"))
        share = 1.0 - visible.sum(axis=1).mean() / N
        np.testing.assert_allclose(numpy(masking.last_mask_ratio), share, atol=1e-6)
        mask = output_mask(kept)
        if strategy == "threshold":
            assert mask[:, :prefix].all()
            np.testing.assert_array_equal(mask[:, prefix:], visible)
            assert not visible.all()
        else:
            assert mask is None
            assert visible.all()


@pytest.mark.one_case
@every_strategy
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_inference_returns_the_very_tokens_and_changes_nothing(strategy, policy):
    masking = make(strategy, dtype=policy)
    masking(tokens_of(ROWS, 1 + N), images=IMAGES, training=True)
    before = values(masking.variables)
    for dtype, training in itertools.product(("float16", "bfloat16"), (None, False)):
        tokens = ops.convert_to_tensor(tokens_of(ROWS, 1 + N, dtype=dtype))
        for out in (masking(tokens, training=training), masking(tokens, IMAGES)):
            assert dtype_of(out) == dtype
            np.testing.assert_array_equal(to_numpy(out), to_numpy(tokens))
            assert output_mask(out) is None
    assert_same_values(masking.variables, before)


@pytest.mark.parametrize("other", [8, 9, 2**40])
def test_another_seed_has_the_noise_of_no_step(other):
    seven, found = (kcm.RandomMasking(seed=seed) for seed in (7, other))
    steps = {numpy(seven.draw(1, 8)).tobytes() for _ in range(20)}
    assert len(steps) == 20
    assert not any(numpy(found.draw(1, 8)).tobytes() in steps for _ in range(20))


@every_strategy
def test_a_seed_repeats_the_masks_of_all_steps(strategy):
    tokens = tokens_of(ROWS, 1 + N)

    def run(seed):
        masking = make(strategy, seed=seed)
        steps = [masking(tokens, images=IMAGES, training=True) for _ in range(2)]
        return np.stack([numpy(kept) for kept in steps])

    one, again, other = run(7), run(7), run(8)
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    assert np.any(one[0] != one[1])


@every_strategy
def test_a_mask_ratio_of_zero_keeps_all_tokens_and_computes_nothing(strategy):
    masking, tokens = make(strategy), tokens_of(ROWS, 1 + N)
    masking.mask_ratio = 0.0
    masking.score = None
    before = values(masking.variables)
    kept = masking(tokens, images=IMAGES, training=True)
    np.testing.assert_array_equal(numpy(kept), tokens)
    assert output_mask(kept) is None
    assert_same_values(masking.variables, before)
    indices, visible = numpy(*masking.select(IMAGES, tokens, NOISE))
    np.testing.assert_array_equal(indices, [range(N)] * ROWS)
    assert visible.all()


@pytest.mark.any_backend
@every_strategy
def test_masks_do_not_depend_on_the_dtype_policy(strategy):
    options = {"embedding_weight": 0.5} if strategy in SIMILARITY else {}
    pixels = IMAGES.astype("float32") / 255.0
    tokens = tokens_of(ROWS, 1 + N)
    float32, mixed = (
        make(strategy, dtype=policy, **options)
        for policy in ("float32", "mixed_bfloat16")
    )
    inputs = pixels, tokens, NOISE
    assert_same_values(mixed.select(*inputs), float32.select(*inputs))


@pytest.mark.any_backend
@every_strategy
def test_the_symbolic_output_has_the_dtype_of_the_tokens(strategy):
    masking = make(strategy, dtype="mixed_bfloat16")
    for dtype in ("float32", "bfloat16"):
        tokens = keras.KerasTensor((ROWS, 1 + N, 6), dtype=dtype)
        images = keras.KerasTensor(IMAGES.shape, dtype="uint8")
        symbolic = masking(tokens, images=images, training=True)
        assert dtype_of(symbolic) == dtype
        assert symbolic.shape == (ROWS, None, 6)
    shape = masking.compute_output_shape((None, 1 + N, 6), IMAGES.shape)
    assert tuple(shape) == (None, None, 6)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("masking", "kept"),
    [
        (kcm.RandomMasking(0.75, 0, seed=3), 4),
        (kcm.GridMasking(2, num_prefix_tokens=0, seed=3), 4),
        (kcm.ClusterMasking(0.75, patch_size=4, seed=3), 4),
        (kcm.ClusterMasking(0.5, patch_size=4, softness=0.3, seed=3), 8),
        (
            kcm.ClusterMasking(
                patch_size=4, min_mask_ratio=0.75, threshold=0.5, seed=3
            ),
            1,
        ),
        (
            kcm.ClusterMasking(
                patch_size=4, min_mask_ratio=0.75, threshold=1.0, seed=3
            ),
            4,
        ),
        (by_threshold(min_mask_ratio=0.75, hide_padding=False, seed=3), 4),
        (kcm.KMeansMasking(0.75, patch_size=4, seed=3), 4),
        *(
            (kcm.EdgeMasking(0.75, patch_size=4, edges=x, seed=3), 4)
            for x in ("protect", None)
        ),
        (kcm.EdgeMasking(0.75, patch_size=4, edges="released", seed=3), 4),
    ],
)
def test_flat_images_keep_every_position_equally_often(masking, kept):
    # Where nothing tells patches apart, every position is as likely as another.
    images = np.full((6000, 16, 16, 1), 200, "uint8")
    images[::2] = 0
    indices, visible = numpy(*masking.select(images, np.zeros((6000, 16, 1))))
    np.testing.assert_array_equal(visible.sum(axis=1), kept)
    counts = np.bincount(indices[visible], minlength=16)
    assert chi_square(counts, 6000, kept) > FALSE_ALARM


IN_PIXELS = {"patch_size": (8, 4), "data_format": "channels_first", "mask_ratio": 0.6}


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (kcm.RandomMasking, {"mask_ratio": 0.6}),
        (kcm.CenteredMasking, {"variance": 0.3, "grid": (4, 6)}),
        (kcm.GridMasking, {"window": 3, "grid": (3, 6)}),
        (kcm.BlockMasking, {"mask_ratio": 0.6, "grid": (4, 6)}),
        (
            kcm.ClusterMasking,
            {
                **IN_PIXELS,
                "anchor_ratio": 0.1,
                "softness": 0.4,
                "embedding_weight": ramp(),
            },
        ),
        (
            kcm.ClusterMasking,
            {
                **IN_PIXELS,
                "min_mask_ratio": 0.3,
                "threshold": 0.25,
                "hide_padding": False,
            },
        ),
        (kcm.KMeansMasking, {**IN_PIXELS, "num_clusters": 3, "iterations": 2}),
        (
            kcm.EdgeMasking,
            {**IN_PIXELS, "seed_ratio": 0.2, "threshold": 0.3, "transport": False},
        ),
        (
            kcm.EdgeMasking,
            {"patch_size": (8, 4), "edges": None, "embedding_weight": 0.25},
        ),
    ],
)
def test_config_round_trip_keeps_every_argument(strategy, options):
    options = {**options, "num_prefix_tokens": 2, "seed": 7, "name": "mask"}
    masking = strategy(**options, dtype="mixed_bfloat16")
    config = masking.get_config()
    for key, value in options.items():
        if not isinstance(value, type(ramp())):
            assert config[key] == value
    serialized = keras.saving.serialize_keras_object(masking)
    revived = keras.saving.deserialize_keras_object(serialized)
    assert type(revived) is strategy
    assert revived.get_config() == config
    assert revived.dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize("strategy", ["random", *SIMILARITY])
def test_gradients_reach_kept_tokens_alone(strategy):
    options = {"embedding_weight": 0.5} if strategy in SIMILARITY else {}
    masking = make(strategy, **options)
    tokens = tokens_of(ROWS, 1 + N)
    indices, _ = numpy(*masking.select(IMAGES, tokens, NOISE))
    source = keras.Variable(tokens)

    def fn():
        total = ops.sum(masking(source.value, IMAGES, training=True, noise=NOISE))
        return total, total

    _, (gradient,) = value_and_gradients(fn, [source])
    expected = np.zeros((ROWS, 1 + N, 6))
    expected[:, 0] = 1.0
    np.put_along_axis(expected, 1 + indices[:, :, None], 1.0, axis=1)
    np.testing.assert_array_equal(gradient, expected)
