import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.masking import patch_masking
from keras_cluster_mask.masking.patch_grid import grid_of_square_patches
from keras_cluster_mask.masking.selection import order_by_score, second_draw
from tests.masking.images import (
    FALSE_ALARM,
    chi_square,
    compiled_step,
    draw_noise,
    dtype_of,
    numpy,
    output_mask,
    tokens_of,
)


class Returns(kcm.PatchMasking):
    """A strategy with a given function in place of `score`."""

    def __init__(self, score, mask_ratio=0.5):
        super().__init__(mask_ratio, num_prefix_tokens=1)
        self.of_noise = score

    def score(self, noise, images=None, tokens=None):
        return self.of_noise(noise)


def odd_patches(noise):
    is_odd = ops.arange(noise.shape[1]) % 2 == 1
    return ops.where(is_odd, noise, -np.inf)


class TestStrategy:
    def test_is_a_class_with_one_method(self):
        class ByLength(kcm.PatchMasking):
            """Keeps the longest tokens."""

            def score(self, noise, images=None, tokens=None):
                return ops.sum(ops.square(tokens[:, 1:]), axis=-1)

        masking = ByLength(0.75, num_prefix_tokens=1)
        tokens = tokens_of(4, 1 + 16)
        kept = numpy(masking(tokens, training=True))
        length = np.sum(tokens[:, 1:] ** 2, axis=-1)
        best = np.sort(np.argsort(-length, axis=1)[:, :4], axis=1)
        expected = np.take_along_axis(tokens[:, 1:], best[:, :, None], axis=1)
        np.testing.assert_array_equal(kept[:, 1:], expected)
        np.testing.assert_array_equal(kept[:, 0], tokens[:, 0])

    @pytest.mark.any_backend
    def test_minus_infinity_hides_nothing_in_a_strategy_that_hides_no_tokens(self):
        masking = Returns(odd_patches, 0.2)
        assert output_mask(masking(tokens_of(2, 1 + 10), training=True)) is None
        # What is not hidden has an influence, and is counted so.
        np.testing.assert_allclose(numpy(masking.last_mask_ratio), 0.2, atol=1e-6)

    @pytest.mark.any_backend
    def test_without_score_is_told_what_to_write(self):
        masking = kcm.PatchMasking(num_prefix_tokens=1)
        with pytest.raises(NotImplementedError, match="must implement `score"):
            masking.select(tokens=tokens_of(2, 9))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("score", "received"),
    [
        (lambda noise: noise[:, :-1], r"shape \(2, 15\)"),
        (lambda noise: noise[0], r"shape \(16,\)"),
        (lambda noise: noise[:1], r"shape \(1, 16\)"),
        (lambda noise: noise[:, :, None], r"shape \(2, 16, 1\)"),
    ],
)
def test_scores_of_another_shape_are_refused_by_name(score, received):
    masking, expected = Returns(score), r"`score` of `returns.*\(2, 16\)"
    with pytest.raises(ValueError, match=f"{expected}.*Received: {received}"):
        masking(tokens_of(2, 17), training=True)


class TestScoresOfNaN:
    @staticmethod
    def nan_in_first_row(noise):
        is_first = ops.arange(ops.shape(noise)[0])[:, None] == 0
        return ops.where(is_first, np.nan, noise)

    @pytest.mark.one_case
    @pytest.mark.parametrize("compiled", [False, True])
    def test_show_in_the_tokens_of_the_image(self, compiled):
        masking = Returns(self.nan_in_first_row)
        if compiled and keras.backend.backend() != "torch":
            assert np.isnan(compiled_step(masking)())
            return
        kept = numpy(masking(tokens_of(2, 17), training=True))
        assert np.isnan(kept[0]).all()
        assert np.isfinite(kept[1]).all()


def test_order_is_by_score_then_larger_noise_then_lower_index():
    rng = np.random.default_rng(0)
    score = rng.integers(-2, 3, (50, 12)).astype("float32")
    # Zeros and minus zeros, which tie.
    score[:, ::2] *= -1.0
    score[score == -2] = -np.inf
    noise = (rng.integers(0, 6, (50, 12)) / 8).astype("float32")
    found = numpy(order_by_score(*map(ops.convert_to_tensor, (score, noise))))
    # A stable sort: patches that tie stay in the order of their indices.
    expected = np.lexsort((-noise, -score), axis=1)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32


def test_noise_is_float32_in_the_unit_interval_under_any_policy():
    noise = kcm.RandomMasking(seed=0, dtype="mixed_bfloat16").draw(100, 196)
    assert dtype_of(noise) == "float32"
    noise = numpy(noise)
    assert noise.shape == (100, 196)
    assert noise.min() >= 0.0
    assert noise.max() < 1.0
    assert abs(noise.mean() - 0.5) < 6 * np.sqrt(1 / 12 / noise.size)
    # Full resolution: rounded to bfloat16 there would be a few hundred values.
    assert len(np.unique(noise)) > 0.99 * noise.size


# Strategies that depend on position alone.
BY_POSITION = [kcm.CenteredMasking, kcm.GridMasking, kcm.BlockMasking]


@pytest.mark.any_backend
@pytest.mark.parametrize("strategy", BY_POSITION)
@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (4, 4)])
def test_a_grid_is_inferred_from_the_size_of_the_images(strategy, grid):
    noise, tokens = draw_noise(np.random.default_rng(0), 4, 16), tokens_of(4, 17)
    images = np.zeros((4, grid[0] * 4, grid[1] * 4, 3), "uint8")
    expected, _ = numpy(*strategy(grid=grid).select(noise=noise))
    inferred = strategy(num_prefix_tokens=1)
    found, _ = numpy(*inferred.select(images, tokens, noise))
    np.testing.assert_array_equal(found, expected)
    if grid == (4, 4):
        assert strategy(grid=4).grid == grid
        # Without images it is square.
        found, _ = numpy(*inferred.select(None, tokens, noise))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.any_backend
def test_noise_is_refused_for_another_number_of_patches():
    masking, tokens = kcm.RandomMasking(0.5, num_prefix_tokens=1), tokens_of(2, 17)
    wrong, right = (np.zeros((2, n), "float32") for n in (10, 16))
    with pytest.raises(ValueError, match=r"`noise` .*Received: noise.shape="):
        masking.select(tokens=tokens, noise=wrong)
    indices, _ = masking.select(tokens=tokens, noise=right.tolist())
    assert tuple(indices.shape) == (2, 8)


@pytest.mark.any_backend
def test_the_number_of_prefix_tokens_may_be_passed_to_a_call():
    tokens, noise = tokens_of(2, 3 + 16), np.random.default_rng(0).random((2, 16))
    expected = kcm.RandomMasking(num_prefix_tokens=3)(
        tokens, training=True, noise=noise
    )
    for masking in (kcm.RandomMasking(), kcm.RandomMasking(num_prefix_tokens=1)):
        found = masking(tokens, training=True, noise=noise, num_prefix_tokens=3)
        np.testing.assert_array_equal(numpy(found), numpy(expected))


@pytest.mark.any_backend
def test_a_replica_draws_for_all_and_takes_its_rows(monkeypatch):
    one, other = (kcm.RandomMasking(0.5, 1, seed=3) for _ in range(2))
    tokens = tokens_of(2, 1 + 16)
    noise = numpy(one.draw(6, 16))[4:]
    monkeypatch.setattr(patch_masking, "num_replicas", lambda: 3)
    monkeypatch.setattr(patch_masking, "local_rows", lambda x: x[4:])
    np.testing.assert_array_equal(
        numpy(other(tokens, training=True)),
        numpy(one(tokens, training=True, noise=noise)),
    )


def test_a_second_draw_is_uniform_and_does_not_depend_on_the_first():
    noise = kcm.RandomMasking(0.5, 0, seed=6).draw(1000, 64)
    first, second = numpy(noise, second_draw(noise))
    np.testing.assert_array_equal(second, np.modf(first.astype("float64") * 4096)[0])
    counts, _, _ = np.histogram2d(
        first.ravel(), second.ravel(), bins=8, range=[(0, 1), (0, 1)]
    )
    assert chi_square(counts.ravel(), first.size, 1) > FALSE_ALARM


@pytest.mark.any_backend
def test_a_grid_is_inferred_from_images_of_both_data_formats():
    assert grid_of_square_patches(8, (1, 3, 16, 32), "channels_first") == (2, 4)
    assert grid_of_square_patches(8, (1, 16, 32, 3), "channels_last") == (2, 4)
    with pytest.raises(ValueError, match=r"`grid` must be given.*num_patches=9"):
        grid_of_square_patches(9, (1, 32, 72, 3), "channels_last")
    with pytest.raises(ValueError, match=r"`grid` must be given.*16 x None pixels"):
        grid_of_square_patches(8, (None, 16, None, 3), "channels_last")
    with pytest.raises(ValueError, match=r"`images` must have rank 4"):
        grid_of_square_patches(8, (16, 32, 3))


@pytest.mark.any_backend
def test_an_incoming_keras_mask_passes_inference():
    tokens = keras.layers.Masking()(ops.convert_to_tensor(tokens_of(2, 17)))
    before = output_mask(tokens)
    assert before is not None
    kept = kcm.RandomMasking(num_prefix_tokens=1)(tokens)
    np.testing.assert_array_equal(output_mask(kept), before)


# === Where values cannot be read ===


def test_check_ready_waits_until_values_can_be_read():
    masking = kcm.ClusterMasking(patch_size=8, min_mask_ratio=0.25, num_prefix_tokens=1)
    images = np.zeros((2, 32, 32, 3), "float32")

    class Model(keras.Model):
        def call(self, tokens, training=None):
            return ops.mean(masking(tokens, images=images, training=training), axis=1)

    # Inference needs no threshold.
    masking(tokens_of(2, 17), images=images)
    model = Model()
    model.masking = masking
    model.compile("sgd", "mse")
    if keras.backend.backend() != "torch":
        loss = model.train_on_batch(tokens_of(2, 17), np.zeros((2, 6), "float32"))
        assert np.isnan(loss)
    with pytest.raises(ValueError, match=r"threshold.*Received: threshold=None"):
        masking(tokens_of(2, 17), images=images, training=True)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Of `jax.jit`.")
def test_a_stateless_call_returns_the_state_of_a_compiled_function():
    jax = pytest.importorskip("jax")
    masking, other = (
        kcm.RandomMasking(0.25, num_prefix_tokens=1, seed=1) for _ in range(2)
    )
    step = jax.jit(lambda *args: masking.stateless_call([], *args, training=True))
    state = [v.value for v in masking.non_trainable_variables]
    for _ in range(2):
        kept, state = step(state, tokens_of(2, 17))
        np.testing.assert_array_equal(
            numpy(kept), numpy(other(tokens_of(2, 17), training=True))
        )


def test_a_masking_shows_its_ratio():
    assert repr(kcm.RandomMasking(0.25)) == "<RandomMasking mask_ratio=0.25>"
    assert repr(kcm.GridMasking(2)) == "<GridMasking mask_ratio=0.75>"
