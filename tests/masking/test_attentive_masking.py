import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import clip_vision_encoder, random_images, tiny_clip, vit_encoder
from tests.masking import masking_reference as reference
from tests.masking.images import GrayAttention, draw_noise, numpy

ROWS = 5


def select(grid, teacher_grid=None, **options):
    """Gray levels of the teacher's grid, noise, and what is kept."""
    teacher_grid = teacher_grid or grid
    levels = np.random.default_rng(0).random((ROWS, *teacher_grid)).astype("float32")
    height, width = (4 * side // count for side, count in zip(grid, teacher_grid))
    images = levels.repeat(height, axis=1).repeat(width, axis=2)[..., None]
    masking = kcm.AttentiveMasking(GrayAttention(teacher_grid), **options)
    noise = draw_noise(np.random.default_rng(1), ROWS, grid[0] * grid[1])
    indices, _ = numpy(*masking.select(images, noise=noise))
    return levels.reshape(ROWS, -1), noise, indices


@pytest.mark.one_case
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


@pytest.mark.any_backend
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


@pytest.mark.any_backend
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
    expected = numpy(model.image_tower.prepare(keras.ops.convert_to_tensor(pixels)))
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("grid", "teacher_grid", "options", "argument"),
    [
        ((4, 5), None, {}, "block_size"),
        ((4, 4), None, {"block_size": 3}, "block_size"),
        ((4, 4), (2, 2), {"block_size": 1}, "teacher"),
        ((8, 8), (2, 2), {}, "teacher"),
        ((4, 4), None, {"block_size": 0}, "block_size"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(grid, teacher_grid, options, argument):
    with pytest.raises(ValueError, match=rf"`{argument}` .*Received: "):
        select(grid, teacher_grid, **options)


@pytest.mark.any_backend
def test_what_is_no_teacher_is_refused():
    with pytest.raises(ValueError, match=r"`teacher` .*Received: teacher="):
        kcm.AttentiveMasking(vit_encoder())


@pytest.mark.any_backend
def test_its_settings_have_no_names_that_are_counted():
    settings = []
    for _ in range(2):
        teacher = kcm.models.MomentumEncoder(vit_encoder(), 0.9, steps=3)
        settings.append(kcm.AttentiveMasking(teacher).settings())
    assert settings[0] == settings[1]
    teacher = dict(momentum=0.9, final_momentum=1.0, steps=3, image_size=None)
    assert settings[0]["teacher"] == teacher
