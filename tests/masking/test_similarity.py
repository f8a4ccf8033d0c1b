import numpy as np
import pytest
from keras import ops

from keras_cluster_mask.masking import similarity as library
from tests.masking import masking_reference as reference
from tests.masking.images import numpy, textured

STEP = 2.0**-12


def tensor(array):
    return ops.convert_to_tensor(array)


def patches_of(images):
    return library.extract_patches(tensor(images), (4, 4), "channels_last")


@pytest.mark.one_case
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixel_similarity_is_the_reference_for_every_anchor(dtype, channels):
    rng = np.random.default_rng(1)
    images = textured(rng, 8, 24, 16, channels, dtype)
    anchors = np.stack([rng.permutation(24)[:5] for _ in range(8)]).astype("int32")
    got = library.pixel_similarity(patches_of(images), tensor(anchors))
    assert got.shape == (8, 5, 24)
    pairwise = reference.pairwise_similarity(images, 4)
    expected = np.take_along_axis(pairwise, anchors[:, :, None], axis=1)
    np.testing.assert_allclose(numpy(got), expected, atol=2e-5, rtol=0)
    rounded = numpy(library.round_similarity(got))
    np.testing.assert_allclose(
        rounded, reference.round_similarity(expected), atol=STEP + 1e-6, rtol=0
    )


@pytest.mark.one_case
@pytest.mark.parametrize("offset", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-12, 1e-4, 1.0, 1e6, 1e12])
def test_pixel_similarity_is_finite_and_1_to_itself(scale, offset):
    images = scale * (textured(np.random.default_rng(3), 8, 24, 16, 3) + offset)
    images[::2] = images[::2].mean()
    got = numpy(library.pixel_similarity(patches_of(images)))
    assert np.isfinite(got).all()
    own = np.diagonal(got, axis1=1, axis2=2)
    np.testing.assert_allclose(own, 1.0, atol=1e-5)


@pytest.mark.any_backend
def test_rounding_is_to_multiples_of_the_step_at_most_1_without_minus_zero():
    values = np.linspace(-1.0, 1.0, 100_001, dtype="float32")
    values = np.concatenate([values, [1.0000002, -1e-6, 1e-6, -0.0]]).astype("float32")
    got = numpy(library.round_similarity(tensor(values)))
    expected = np.minimum(reference.round_similarity(values), 1.0)
    np.testing.assert_array_equal(got, expected)
    assert not np.signbit(got[got == 0.0]).any()


# === The threshold ===


def random_similarities(seed, images=50, num_patches=20):
    values = np.random.default_rng(seed).beta(2, 3, (images, num_patches)) * 2 - 1
    return (np.round(values / STEP) * STEP).astype("float32")


def mask_ratio_at(similarities, threshold, max_visible):
    visible = np.clip((similarities <= threshold).sum(axis=1), 1, max_visible)
    return 1.0 - visible.mean() / similarities.shape[1]


@pytest.mark.any_backend
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mask_ratio", [0.21, 0.3, 0.5, 0.777, 0.94])
def test_finds_the_nearest_ratio_of_all_thresholds(seed, mask_ratio):
    similarities, max_visible = random_similarities(seed), 16
    every = (np.arange(-4097, 4097) + 0.5) * STEP
    visible = [np.searchsorted(np.sort(row), every, "right") for row in similarities]
    ratios = 1.0 - np.clip(visible, 1, max_visible).mean(axis=0) / 20
    found = library.find_threshold(similarities, mask_ratio, max_visible)
    best = np.abs(ratios - mask_ratio).min()
    reached = mask_ratio_at(similarities, found, max_visible)
    assert abs(reached - mask_ratio) == pytest.approx(best, abs=1e-12)
    assert -1.0 <= found <= 1.0
    # It lies between two similarities.
    assert found / STEP % 1.0 == 0.5


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("mask_ratio", "max_visible"), [(0.05, 16), (0.185, 16), (0.965, 20), (0.99, 20)]
)
def test_out_of_reach_says_what_is_within(mask_ratio, max_visible):
    similarities = random_similarities(1)
    message = r"nearest ratios that a threshold can reach are .*Received: mask_ratio="
    with pytest.raises(ValueError, match=message):
        library.find_threshold(similarities, mask_ratio, max_visible)
