import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.masking import masking_statistics
from keras_cluster_mask.masking.patch_masking import join
from tests.helpers import (
    assert_same_values,
    clip_vision_encoder,
    random_images,
    values,
)
from tests.masking import test_cluster_masking
from tests.masking.images import numpy, textured

pytestmark = pytest.mark.any_backend

IMAGES, N = 10, 24
PIXELS = textured(np.random.default_rng(1), IMAGES, 16, 24, 3)
MODES = {**test_cluster_masking.MODES, "tokens": {"embedding_weight": 0.5}}


def cluster_masking(**options):
    return kcm.ClusterMasking(4, data_format="channels_last", **options)


def embed(images):
    """Cuts the values of each image into as many tokens as it has patches."""
    return ops.reshape(images, (-1, N, 48))


def statistics_of(masking, data, **options):
    return masking_statistics(masking, data, **{"verbose": 0, **options})


@pytest.mark.parametrize("mode", MODES)
def test_are_those_of_what_is_selected(mode):
    masking = cluster_masking(**MODES[mode])
    before = values(masking.variables)
    found = statistics_of(masking, PIXELS, seed=7, embed=embed)
    assert_same_values(masking.variables, before)

    noise = np.random.default_rng(7).random((IMAGES, N), dtype="float32")
    tokens = embed(PIXELS)
    indices, visible = numpy(*masking.select(PIXELS, tokens, noise))
    seen = [row[stays] for row, stays in zip(indices, visible)]
    np.testing.assert_allclose(
        found["keep_ratio"], [len(x) / N for x in seen], rtol=1e-6
    )
    times = np.bincount(np.concatenate(seen), minlength=N).reshape(4, 6)
    np.testing.assert_allclose(found["kept_by_position"], times / IMAGES)
    # The same as a training step reports.
    masking(tokens, images=PIXELS, training=True, noise=noise)
    reported = 1.0 - float(masking.last_mask_ratio)
    assert found["keep_ratio"].mean() == pytest.approx(reported, abs=1e-6)


def test_are_the_same_in_batches_of_any_size_and_in_other_layouts():
    masking = cluster_masking()
    whole = statistics_of(masking, PIXELS, seed=5)
    for size in (1, 3):
        batches = (PIXELS[start : start + size] for start in range(0, IMAGES, size))
        assert_same_values(statistics_of(masking, batches, seed=5), whole)
    masking = kcm.ClusterMasking(4, data_format="channels_first")
    channels_first = np.moveaxis(PIXELS, -1, 1)
    assert_same_values(statistics_of(masking, channels_first, seed=5), whole)


def test_look_at_images_as_the_model_prepares_them():
    masking = cluster_masking()
    join(masking, lambda pixels: ops.flip(pixels, axis=1))
    flipped = statistics_of(cluster_masking(), PIXELS[:, ::-1].copy())
    assert_same_values(statistics_of(masking, PIXELS), flipped)


def test_a_masking_that_learns_its_prefix_from_an_encoder_can_be_measured():
    masking = kcm.RandomMasking(0.5)
    encoder = kcm.with_masking(clip_vision_encoder(), masking)
    for embed in (None, encoder.embed_patches):
        found = statistics_of(masking, random_images(4), patch_size=4, embed=embed)
        np.testing.assert_array_equal(found["keep_ratio"], [0.5] * 4)


TWO_SIZES = [np.zeros((2, 16, 24, 3)), np.zeros((2, 24, 16, 3))]


@pytest.mark.parametrize(
    ("masking", "arguments", "message"),
    [
        (cluster_masking(), {"data": []}, "`data` "),
        (cluster_masking(), {"data": np.zeros((2, 16, 18, 3))}, "`images` "),
        (cluster_masking(), {"data": np.zeros((16, 24, 3))}, "`images` "),
        (cluster_masking(), {"data": TWO_SIZES}, "`data` "),
        (cluster_masking(), {"patch_size": 8}, "`patch_size` "),
        (cluster_masking(min_mask_ratio=0.2), {}, "`threshold`"),
        (kcm.RandomMasking(0.5, num_prefix_tokens=1), {}, "`patch_size` "),
        (
            kcm.RandomMasking(0.5, num_prefix_tokens=1),
            {"patch_size": 4, "embed": lambda x: np.zeros((len(x), 26, 8), "float32")},
            "`noise` ",
        ),
        (cluster_masking(embedding_weight=0.5), {}, "`tokens` "),
    ],
)
def test_refuse_and_name_the_argument(masking, arguments, message):
    arguments = {"data": np.zeros((2, 16, 24, 3), "float32"), **arguments}
    with pytest.raises(ValueError, match=rf"{message}[\s\S]*Received: "):
        statistics_of(masking, **arguments)


def test_progress_is_shown_as_in_keras(capsys):
    keras.config.enable_interactive_logging()
    statistics_of(cluster_masking(), PIXELS, verbose=0)
    assert not capsys.readouterr().out
    statistics_of(cluster_masking(), PIXELS, verbose="auto")
    printed = capsys.readouterr().out
    assert "10/10" in printed
    assert "keep_ratio: 0.5000" in printed
