import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import clip_vision_encoder, random_images, tiny_clip, vit_encoder
from tests.masking import masking_reference as reference
from tests.masking.images import draw_noise, numpy

ROWS = 5


@keras.saving.register_keras_serializable(package="tests")
class KnownAttention(keras.layers.Layer):
    """A teacher whose attention is known: of a grid, for patches of 4 x 4 pixels."""

    patch_size, data_format = (4, 4), "channels_last"

    def __init__(self, grid, seed=0):
        super().__init__()
        self.grid = grid
        rng = np.random.default_rng(seed)
        self.values = rng.random((ROWS, grid[0] * grid[1])).astype("float32")

    def attention(self, images):
        return keras.ops.convert_to_tensor(self.values)

    def follow(self, encoder):
        pass

    def check_ready(self):
        pass

    def update(self):
        pass


def images_of(grid):
    return np.zeros((ROWS, 4 * grid[0], 4 * grid[1], 3), "float32")


def select(grid, teacher_grid=None, noise=None, **options):
    teacher = KnownAttention(teacher_grid or grid)
    masking = kcm.AttentiveMasking(teacher, **options)
    if noise is None:
        noise = draw_noise(np.random.default_rng(1), ROWS, grid[0] * grid[1])
    indices, visible = numpy(*masking.select(images_of(grid), noise=noise))
    assert visible.all()
    return teacher.values, noise, indices


@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    ("grid", "teacher_grid", "block_size"),
    [
        ((14, 14), None, 2),
        ((14, 14), (7, 7), 2),
        ((14, 14), (28, 28), 2),
        ((4, 6), None, 1),
        ((4, 6), (8, 6), 2),
        ((6, 9), (4, 3), 3),
    ],
)
def test_selects_as_the_reference(grid, teacher_grid, block_size, mask_ratio):
    attention, noise, found = select(
        grid, teacher_grid, mask_ratio=mask_ratio, block_size=block_size
    )
    expected, _ = reference.select_attentive(
        attention, noise, grid, teacher_grid or grid, block_size, mask_ratio
    )
    np.testing.assert_array_equal(found, expected)


def test_half_of_14_x_14_is_24_whole_blocks_and_two_patches():
    attention, noise, indices = select((14, 14))
    means = attention.reshape(ROWS, 7, 2, 7, 2).mean(axis=(2, 4)).reshape(ROWS, 49)
    for row in range(ROWS):
        blocks = indices[row] // 14 // 2 * 7 + indices[row] % 14 // 2
        counts = np.bincount(blocks, minlength=49)
        order = np.argsort(-means[row])
        np.testing.assert_array_equal(counts[order], [4] * 24 + [2] + [0] * 24)
        # The two of the last block have the larger noise.
        last = order[24]
        first = 28 * (last // 7) + 2 * (last % 7)
        patches = first + np.array([0, 1, 14, 15])
        largest = patches[np.argsort(-noise[row, patches])[:2]]
        assert {*largest} == {*indices[row][blocks == last]}


def test_noise_decides_within_a_block_alone():
    rng = np.random.default_rng(3)
    for mask_ratio, same in ((0.5, True), (0.4, False)):
        # 8 of 16 patches are two blocks, 9 one patch more.
        first, second = (
            select((4, 4), noise=draw_noise(rng, ROWS, 16), mask_ratio=mask_ratio)[2]
            for _ in range(2)
        )
        assert np.array_equal(first, second) == same
    assert not kcm.AttentiveMasking.is_random
    assert kcm.RandomMasking.is_random


def test_keeps_what_the_class_token_attends_to():
    encoder = vit_encoder()
    teacher = kcm.models.MomentumEncoder(encoder)
    masking = kcm.AttentiveMasking(teacher, 0.75, block_size=1)
    images = random_images(6)
    attention = numpy(teacher.attention(images))
    indices, _ = numpy(*masking.select(images))
    expected = np.sort(np.argsort(-attention, axis=1)[:, :4], axis=1)
    np.testing.assert_array_equal(indices, expected)


def test_keeps_tokens_of_whole_blocks_in_an_encoder():
    encoder = clip_vision_encoder()
    teacher = kcm.models.MomentumEncoder(encoder, image_size=8)
    masked = kcm.with_masking(encoder, kcm.AttentiveMasking(teacher, 0.75))
    images = random_images(3)
    assert masked(images, training=True).shape == (3, 1 + 4, 16)
    indices, _ = numpy(*masked.masking.select(images))
    best = numpy(teacher.attention(images)).argmax(axis=1)
    top_left = best // 2 * 8 + best % 2 * 2
    np.testing.assert_array_equal(indices, top_left[:, None] + [0, 1, 4, 5])


def test_the_model_hands_normalized_pixels_to_the_teacher():
    backbone = tiny_clip()
    teacher = kcm.models.MomentumEncoder(backbone.vision_encoder)
    masking = kcm.AttentiveMasking(teacher, seed=1)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype("uint8")
    seen = []
    attention = teacher.attention
    teacher.attention = lambda x: seen.append(numpy(x)) or attention(x)
    model.encode_image(pixels, training=True)
    expected = numpy(model.normalize_pixels(keras.ops.convert_to_tensor(pixels)))
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)
    statistics = kcm.masking.masking_statistics(masking, pixels)
    assert statistics.num_images == 4


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("grid", "teacher_grid", "options", "message"),
    [
        ((4, 5), None, {}, "`block_size` must divide"),
        ((4, 4), None, {"block_size": 3}, "`block_size` must divide"),
        ((4, 4), (3, 3), {}, "grid of `teacher`.*the grid of blocks, 2 x 2"),
        ((4, 4), (2, 2), {"block_size": 1}, "grid of `teacher` must be divisible"),
        ((8, 8), (2, 2), {}, "pass another `image_size`"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(grid, teacher_grid, options, message):
    with pytest.raises(ValueError, match=message):
        select(grid, teacher_grid, **options)


@pytest.mark.any_backend
@pytest.mark.parametrize("block_size", [0, -2, 1.5, None])
def test_a_block_size_without_a_meaning_is_refused(block_size):
    with pytest.raises(ValueError, match="`block_size` must be an integer"):
        kcm.AttentiveMasking(KnownAttention((4, 4)), block_size=block_size)


@pytest.mark.any_backend
def test_what_is_no_teacher_is_refused():
    with pytest.raises(ValueError, match="`teacher` must be a `kcm"):
        kcm.AttentiveMasking(vit_encoder())
    with pytest.raises(ValueError, match="needs the images"):
        kcm.AttentiveMasking(KnownAttention((4, 4))).select(tokens=np.zeros((2, 17, 8)))


@pytest.mark.any_backend
def test_its_settings_have_no_names_that_are_counted():
    settings = []
    for _ in range(2):
        teacher = kcm.models.MomentumEncoder(vit_encoder(), 0.9, steps=3)
        settings.append(kcm.AttentiveMasking(teacher, name="masking").settings())
    assert settings[0] == settings[1]
    assert settings[0]["teacher"] == {
        "momentum": 0.9,
        "final_momentum": 1.0,
        "steps": 3,
        "image_size": None,
    }
