"""What maskings refuse, by the name of the argument."""

import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.masking.images import ramp
from tests.masking.test_patch_masking import BY_POSITION

pytestmark = pytest.mark.any_backend

BY_PIXELS = kcm.ClusterMasking, kcm.KMeansMasking, kcm.EdgeMasking
THRESHOLD = {"min_mask_ratio": 0.3}


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        # The option that is refused comes first.
        *((kcm.RandomMasking, {"mask_ratio": x}) for x in (1.0, -0.1)),
        (kcm.RandomMasking, {"num_prefix_tokens": -1}),
        (kcm.CenteredMasking, {"variance": 0}),
        (kcm.GridMasking, {"window": 0}),
        *((strategy, {"grid": (4, 0)}) for strategy in BY_POSITION),
        *(
            (strategy, option)
            for strategy in BY_PIXELS
            for option in (
                {"embedding_weight": 1.1},
                {"data_format": "NHWC"},
                {"patch_size": 0},
            )
        ),
        (kcm.ClusterMasking, {"anchor_ratio": 1.1}),
        (kcm.ClusterMasking, {"softness": -0.1}),
        (kcm.ClusterMasking, {"softness": 0.1, **THRESHOLD}),
        (kcm.ClusterMasking, {"hide_padding": False}),
        (kcm.ClusterMasking, {"hide_padding": "no"}),
        (kcm.ClusterMasking, {"min_mask_ratio": 1.0}),
        (kcm.ClusterMasking, {"threshold": 0.5}),
        (kcm.ClusterMasking, {"threshold": 1.5, **THRESHOLD}),
        *(
            (kcm.ClusterMasking, {"mask_ratio": 0.3, "embedding_weight": x} | THRESHOLD)
            for x in (0.5, ramp())
        ),
        (kcm.KMeansMasking, {"num_clusters": 0}),
        (kcm.KMeansMasking, {"iterations": 0}),
        (kcm.EdgeMasking, {"edges": "released "}),
        (kcm.EdgeMasking, {"threshold": -1.5}),
        (kcm.EdgeMasking, {"seed_ratio": 1.1}),
        (kcm.EdgeMasking, {"transport": "no"}),
    ],
)
def test_an_option_out_of_range_is_refused(strategy, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"(?s)`{name}` .*Received: {name}="):
        strategy(**options)


def random(prefix=1):
    return kcm.RandomMasking(num_prefix_tokens=prefix)


def cluster(prefix=None, **options):
    return kcm.ClusterMasking(patch_size=8, num_prefix_tokens=prefix, **options)


FIRST = {"data_format": "channels_first"}


@pytest.mark.parametrize(
    ("masking", "inputs", "message"),
    [
        (random(), {"tokens": (2, 17)}, r"`tokens` .*Received: tokens.shape="),
        *(
            (random(), {"noise": shape}, "`noise` .*Received: noise.shape=")
            for shape in ((2, 15), (2, 17), (16,), (2, 16, 1), (3, 16))
        ),
        # How many of the tokens are patches.
        (random(None), {}, "`num_prefix_tokens`.*Received: num_prefix_tokens=None"),
        (random(17), {}, "`num_prefix_tokens`.*Received: .*17, 17 tokens"),
        (kcm.KMeansMasking(), {}, "`num_prefix_tokens`.*Received: "),
        *(
            (
                cluster(prefix),
                {"tokens": (2, n, 6)},
                f"`patch_size` .*`num_prefix_tokens`.*Received: {n} tokens.*{prefix}",
            )
            for n, prefix in ((15, None), (17, 0), (17, 2), (144, None))
        ),
        *(
            (
                each(grid=4, num_prefix_tokens=1),
                {"tokens": (2, 21, 6)},
                "`grid`.*Received: 21 tokens",
            )
            for each in BY_POSITION
        ),
        # The grid of patches.
        *(
            (each(num_prefix_tokens=1), inputs, "`grid` .*Received: grid=None")
            for each in BY_POSITION
            for inputs in (
                {"tokens": (2, 13, 6), "images": None},
                {"tokens": (2, 13, 6), "images": (2, 16, 16, 3)},
                {"images": (2, 16, 48, 3)},
            )
        ),
        *(
            (kcm.GridMasking(grid=grid), {}, "`window` .*Received: window=")
            for grid in ((1, 16), (16, 1))
        ),
        # Images.
        (cluster(), {"images": None}, "images.*Received: images=None"),
        *(
            (cluster(), {"images": shape}, f"`images` .*Received: {received}")
            for shape, received in (
                ((2, 30, 32, 3), "height=30"),
                ((2, 32, 30, 3), "width=30"),
                ((2, 32, 32), "images.shape="),
            )
        ),
        (cluster(**FIRST), {"images": (2, 3, 32, 30)}, "`images` .*Received: width=30"),
        (
            kcm.KMeansMasking(patch_size=8, num_clusters=17),
            {},
            "`num_clusters` .*Received: ",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(masking, inputs, message):
    shapes = {"tokens": (2, 17, 6), "images": (2, 32, 32, 3), **inputs}
    inputs = {k: x and np.zeros(x, "float32") for k, x in shapes.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        masking(training=True, **inputs)


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        (kcm.BlockMasking(grid=4), "needs `images`, `tokens` or `noise`"),
        (random(), "`tokens` "),
        (cluster(embedding_weight=0.5), "`tokens` must be given"),
    ],
)
def test_a_selection_needs_what_it_looks_at(masking, message):
    images = None if masking.patch_size is None else np.zeros((2, 32, 32, 3))
    with pytest.raises(ValueError, match=f"{message}.*Received: "):
        masking.select(images)
