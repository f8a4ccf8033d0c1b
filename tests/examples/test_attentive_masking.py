"""A-CLIP against its reference, with its teacher and crops; that the program runs."""

import attentive_masking as program
import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    assert_close,
    clip_vision_encoder,
    random_images,
    random_pairs,
    tiny_clip,
    to_numpy,
    vision_encoder,
)
from tests.masking.images import draw_noise, numpy

pytestmark = pytest.mark.slow


def select(attention, noise, grid, block_size, mask_ratio):
    """The K patches in the blocks of most attention; ties go to larger noise."""
    rows, columns = (side // block_size for side in grid)
    seen = attention.astype("float64").reshape(
        -1, rows, block_size, columns, block_size
    )
    score = seen.mean(axis=(2, 4)).repeat(block_size, 1).repeat(block_size, 2)
    count = max(1, int(noise.shape[1] * (1 - mask_ratio) + 1e-6))
    scores = score.reshape(noise.shape)
    best = [np.lexsort((-row, -score))[:count] for score, row in zip(scores, noise)]
    return np.sort(best, axis=1)


def class_attention(encoder, images):
    """The class token's attention to the patches, as Keras's layers return it."""
    call, rows = keras.layers.MultiHeadAttention.call, []

    def recorded(self, *args, **kwargs):
        output, scores = call(self, *args, return_attention_scores=True, **kwargs)
        rows.append(to_numpy(scores)[:, :, 0])
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.layers.MultiHeadAttention, "call", recorded)
        encoder({"images": images}, training=False)
    assert len(rows) == len(encoder.encoder_layers)
    return np.mean(rows, axis=(0, 2))[:, 1:]


def moved(encoder, seed):
    """The encoder with other weights, about as large as trained ones."""
    rng = np.random.default_rng(seed)
    for weight in encoder.trainable_weights:
        weight.assign(0.3 * rng.normal(size=weight.shape))
    return encoder


def masking_of(encoder, mask_ratio=0.5, block_size=2, momentum=0.9, steps=4):
    return program.AttentiveMasking(encoder, mask_ratio, block_size, momentum, steps)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("side", "block_size"), [(24, 2), (24, 1), (24, 3), (16, 4)])
def test_selects_as_the_reference(side, block_size, mask_ratio):
    grid = side // 4, side // 4
    options = {"num_layers": 3, "image_shape": (side, side, 3)}
    encoder = moved(vision_encoder("CLIP", **options), 1)
    images = np.random.default_rng(0).normal(size=(5, side, side, 3)).astype("float32")
    noise = draw_noise(np.random.default_rng(1), 5, grid[0] * grid[1])
    masking = masking_of(encoder, mask_ratio, block_size)
    attention = class_attention(encoder, images)
    assert_close(program.class_attention(masking.teacher, images), attention, 1e-5)
    expected = select(attention, noise, grid, block_size, mask_ratio)
    found, visible = numpy(*masking.select(images, noise=noise))
    np.testing.assert_array_equal(found, expected)
    assert visible.all()


def test_blocks_that_do_not_fill_the_grid_are_refused():
    masking = masking_of(clip_vision_encoder(), block_size=3)
    with pytest.raises(ValueError, match=r"--block-size.*Received: 3"):
        masking.select(random_images(2))


def test_the_teacher_follows_the_encoder_with_a_momentum_that_rises():
    encoder = moved(clip_vision_encoder(), 1)
    masking = masking_of(encoder)
    expected = [to_numpy(v) for v in encoder.trainable_weights]
    assert not masking.trainable_weights
    for step in range(6):
        moved(encoder, step)
        share = 0.1 * (1 + np.cos(np.pi * min(step / 4, 1))) / 2
        expected = [
            x + share * (to_numpy(v) - x)
            for x, v in zip(expected, encoder.trainable_weights)
        ]
        masking.advance()
    floats = [v for v in masking.teacher.weights if "float" in str(v.dtype)]
    assert_close(floats, expected, 1e-6)


@pytest.mark.parametrize(("side", "place"), [(1.0, 0.3), (0.5, 0.0), (0.75, 1.0)])
def test_crops_are_resized_with_bilinear_weights(side, place):
    found = to_numpy(program.interpolation(np.float32(side), np.float32(place), 8))
    assert_close(found.sum(axis=1), np.ones(8), 1e-6)
    start = place * (1 - side) * 8
    centers = np.clip(start + side * (np.arange(8) + 0.5) - 0.5, 0, 7)
    # The place of each pixel is that of its center.
    assert_close(found @ np.arange(8), centers, 1e-5)
    if side == 1:
        assert_close(found, np.eye(8), 1e-6)


def test_the_loss_is_the_mean_over_views_of_one_step():
    backbone = tiny_clip()
    masking = masking_of(backbone.vision_encoder)
    model = program.CroppingModel.from_backbone(backbone, masking=masking)
    model.compile(keras.optimizers.SGD(0.0), **FAST)
    pairs = random_pairs(4)
    outputs = model(pairs, training=True)
    assert int(masking.num_updates) == 1
    views = [to_numpy(view) for view in outputs["views"]]
    assert len(views) == 2
    assert np.abs(views[0] - views[1]).max() > 1e-3
    single = kcm.ContrastiveModel.from_backbone(backbone)
    single.compile("sgd", **FAST)
    losses = [
        single.compute_loss(pairs, None, {**outputs, "image_embeddings": view})
        for view in outputs["views"]
    ]
    loss = model.compute_loss(pairs, None, outputs)
    assert_close([loss], [np.mean([*map(to_numpy, losses)])], 1e-6)


@pytest.mark.parametrize("views", [1, 2])
def test_it_runs_in_a_tiny_setting(shard, views):
    flags = f"""--train={shard} --image-size=32 --batch-size=16 --epochs=2
        --views={views} --momentum=0.5"""
    model = program.main(program.parse(flags.split()))
    history, masking = model.history.history, model.masking
    assert np.isfinite(history["loss"]).all()
    assert history["mask_ratio"] == [0.5, 0.5]
    assert len(model.trainable_weights) == len(model.backbone.trainable_weights)
    weights = zip(masking.teacher.weights, model.backbone.vision_encoder.weights)
    assert any(np.abs(to_numpy(x) - to_numpy(y)).max() > 1e-5 for x, y in weights)
