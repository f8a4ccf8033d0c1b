"""The methods of `quality.py`: ways to mask half of the patches, and their variants."""

import dataclasses
import math
from collections.abc import Callable

from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.masking.similarity import (
    extract_patches,
    pixel_similarity,
    round_similarity,
    token_similarity,
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Args:
        masking: Function from a patch size to a masking, or `None` for whole images.
        image_scale: The side of the images that the model reads, over the full side.
        background: What transparent training images are laid over, as for
            `image_text_dataset`.
        over_training: Dictionary from attributes of the masking to the values they have
            in each equal part of the training, instead of the same throughout.
        equal_time: Whether to train for as long as `random` takes rather than for
            as many steps.
    """

    masking: Callable | None = None
    image_scale: float = 1.0
    background: str | list = "white"
    over_training: dict = dataclasses.field(default_factory=dict)
    equal_time: bool = False


def random(patch_size):
    return kcm.RandomMasking(0.5)


def cluster(patch_size, **options):
    return kcm.ClusterMasking(patch_size, 0.5, **options)


def soft(softness):
    return lambda patch_size: cluster(patch_size, softness=softness)


class PartlyRandom(kcm.ClusterMasking):
    """Clusters in every second image, random patches in the others."""

    def score(self, noise, images=None, tokens=None):
        by_cluster = super().score(noise, images, tokens)
        # Any digit of the noise that has no part in the order makes a fair coin.
        coin = ops.floor(noise[:, :1] * 4096.0) % 2.0
        return ops.where(coin < 1.0, by_cluster, ops.zeros_like(by_cluster))


class Colour(kcm.ClusterMasking):
    """Adds to the similarity of patterns that of the patches' mean colours."""

    def similarity(self, images, anchors, tokens=None):
        patches = extract_patches(images, self.patch_size, self.data_format)
        pattern = pixel_similarity(patches, anchors)
        count, values = patches.shape[1:]
        colours = ops.reshape(patches, (-1, count, values // 3, 3))
        colours = ops.mean(ops.cast(colours, "float32") / 255.0, axis=2)
        chosen = ops.take_along_axis(colours, anchors[:, :, None], axis=1)
        gap = ops.sum(
            ops.square(chosen[:, :, None, :] - colours[:, None, :, :]), axis=-1
        )
        alike = ops.exp(-gap / 0.02)
        return round_similarity(ops.max(0.5 * pattern + 0.5 * alike, axis=1))


class RawPixels(kcm.ClusterMasking):
    """Compares patches without taking their means off: colour counts most."""

    def similarity(self, images, anchors, tokens=None):
        patches = extract_patches(images, self.patch_size, self.data_format)
        # The cosine that tokens are compared by.
        alike = token_similarity(patches, anchors)
        return round_similarity(ops.max(alike, axis=1))


class Near(kcm.ClusterMasking):
    """Prefers look-alikes that are also near the anchor in the image."""

    def similarity(self, images, anchors, tokens=None):
        patches = extract_patches(images, self.patch_size, self.data_format)
        alike = pixel_similarity(patches, anchors)
        near = nearness(anchors, patches.shape[1])
        return round_similarity(ops.max(0.5 * alike + 0.5 * near, axis=1))


class Disc(kcm.ClusterMasking):
    """Hides a round part of the image, whatever it shows."""

    def similarity(self, images, anchors, tokens=None):
        near = nearness(anchors, self.count_patches(images))
        return round_similarity(ops.max(near, axis=1))


def nearness(anchors, count):
    """`(batch, A, N)` from 1 at an anchor to 0 far away, on a square grid."""
    side = round(count**0.5)
    places = ops.arange(count, dtype=anchors.dtype)
    gap = ops.square(anchors[:, :, None] // side - places // side)
    gap = gap + ops.square(anchors[:, :, None] % side - places % side)
    return ops.exp(-ops.cast(gap, "float32") / (2.0 * (side / 4.0) ** 2))


class KeepAnchors(kcm.ClusterMasking):
    """Leaves out look-alikes but not the anchors: each cluster keeps one patch.

    Of the others, those of contrast stay with higher odds, the more so the larger
    `detail`.
    """

    def __init__(self, *args, detail=0.0, **options):
        super().__init__(*args, **options)
        self.detail = detail

    def get_config(self):
        return super().get_config() | {"detail": self.detail}

    def score(self, noise, images=None, tokens=None):
        anchors = self.draw_anchors(noise)
        chosen = ops.any(
            anchors[:, :, None] == ops.arange(noise.shape[1], dtype=anchors.dtype),
            axis=1,
        )
        score = super().score(noise, images, tokens)
        if self.detail:
            contrast = log_contrast(images, self.patch_size, 0.1)
            score = score + self.detail * contrast
        return ops.where(chosen, math.inf, score)


class Detail(kcm.PatchMasking):
    """Keeps patches of contrast with higher odds, the more so the lower `floor`."""

    def __init__(self, patch_size, floor=1.0, mask_ratio=0.5, **options):
        super().__init__(mask_ratio, **options)
        self.patch_size = patch_size
        self.floor = floor

    def get_config(self):
        own = {"patch_size": self.patch_size, "floor": self.floor}
        return super().get_config() | own

    def count_patches(self, images=None, tokens=None):
        return (images.shape[1] // self.patch_size) ** 2

    def score(self, noise, images=None, tokens=None):
        sides = (self.patch_size, self.patch_size)
        return log_contrast(images, sides, self.floor) + 0.5 * gumbel(noise)


class FlatAnchors(kcm.ClusterMasking):
    """Draws anchors of little contrast with higher odds: surfaces go, things stay."""

    def score(self, noise, images=None, tokens=None):
        contrast = log_contrast(images, self.patch_size, 0.1)
        # Small noise makes an anchor, here as everywhere.
        anchors = self.draw_anchors(contrast - 0.5 * gumbel(1.0 - noise))
        return -self.similarity(images, anchors, tokens)


class DetailStays(kcm.ClusterMasking):
    """Soft clusters in which patches of more contrast stay with higher odds."""

    def score(self, noise, images=None, tokens=None):
        contrast = log_contrast(images, self.patch_size, 0.1)
        return super().score(noise, images, tokens) + 0.3 * contrast


def log_contrast(images, patch_size, floor):
    """`(batch, N)` logarithm of the patches' standard deviation plus `floor`.

    Of images as the model reads them, normalised: deviations are from 0 to about 1.
    """
    patches = extract_patches(images, patch_size, "channels_last")
    return ops.log(ops.std(patches, axis=-1) + floor)


def gumbel(noise):
    return -ops.log(-ops.log(ops.clip(noise, 1e-12, 1.0 - 1e-7)))


def threshold(beta, mask_ratio, **options):
    # A masking needs its threshold before the first step: `quality_training` calls
    # `adapt` on training images.
    return lambda patch_size: kcm.ClusterMasking(
        patch_size, mask_ratio, min_mask_ratio=beta, **options
    )


# By name, for models that come back from a checkpoint.
OWN_MASKINGS = {
    masking.__name__: masking
    for masking in (
        PartlyRandom,
        Colour,
        RawPixels,
        Near,
        Disc,
        KeepAnchors,
        Detail,
        FlatAnchors,
        DetailStays,
    )
}

RAMP = {"mask_ratio": (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)}
WHOLE_END = {"mask_ratio": (*[0.5714] * 7, 0.0)}
# Gumbel noise of infinite weight is random masking.
SOFTER = (0.0, 0.0, 0.1, 0.2, 0.4, 0.8, math.inf, math.inf)

# Backgrounds of transparent images, under the names of the stored runs.
BACKGROUNDS = {
    f"{name}, {kind} ground": Method(make, background=drawn)  # codespell:ignore ground
    for kind, drawn in {"random": "random", "mixed": ["white", "random"]}.items()
    for name, make in {"random": random, "cluster": cluster}.items()
}
METHODS = {
    "none": Method(),
    "none, equal time": Method(equal_time=True),
    "resized": Method(image_scale=0.75),
    "random": Method(random),
    "cluster": Method(cluster),
    "threshold": Method(threshold(0.5, 0.6)),
    "threshold, fill-in": Method(threshold(0.5, 0.6, hide_padding=False)),
    # Softness.
    "cluster, softness 0.1": Method(soft(0.1)),
    "cluster, softness 0.3": Method(soft(0.3)),
    "cluster, every second image": Method(lambda p: PartlyRandom(p, 0.5)),
    # Anchors.
    "cluster, 1 anchor": Method(lambda p: cluster(p, anchor_ratio=0.0)),
    "cluster, 7 anchors": Method(lambda p: cluster(p, anchor_ratio=7 / 64)),
    "cluster, 13 anchors": Method(lambda p: cluster(p, anchor_ratio=13 / 64)),
    "cluster, anchors stay": Method(lambda p: KeepAnchors(p, 0.5)),
    "cluster, 13 anchors stay": Method(
        lambda p: KeepAnchors(p, 0.5, anchor_ratio=13 / 64)
    ),
    "cluster, 13 anchors and detail stay": Method(
        lambda p: KeepAnchors(p, 0.5, anchor_ratio=13 / 64, detail=0.3)
    ),
    # Similarity.
    "cluster, colour": Method(lambda p: Colour(p, 0.5)),
    "cluster, raw pixels": Method(lambda p: RawPixels(p, 0.5)),
    "cluster, near": Method(lambda p: Near(p, 0.5)),
    "cluster, token mix 0.5": Method(lambda p: cluster(p, embedding_weight=0.5)),
    "disc": Method(lambda p: Disc(p, 0.5, anchor_ratio=0.0)),
    "cluster, flat anchors": Method(lambda p: FlatAnchors(p, 0.5)),
    "cluster, detail stays": Method(lambda p: DetailStays(p, 0.5, softness=0.3)),
    "detail": Method(Detail),
    "detail, strong": Method(lambda p: Detail(p, floor=0.1)),
    # The ratio over training; each keeps half of the patches on average.
    "random, ratio ramp": Method(random, over_training=RAMP),
    "cluster, ratio ramp": Method(cluster, over_training=RAMP),
    "random, whole end": Method(random, over_training=WHOLE_END),
    "cluster, whole end": Method(cluster, over_training=WHOLE_END),
    # From clusters to random patches, and the other way round.
    "cluster, then random": Method(cluster, over_training={"softness": SOFTER}),
    "random, then cluster": Method(cluster, over_training={"softness": SOFTER[::-1]}),
    **BACKGROUNDS,
}

STUDIES = {
    "methods": (
        "none",
        "none, equal time",
        "resized",
        "random",
        "cluster",
        "threshold",
        "threshold, fill-in",
        "detail",
    ),
    "softness": (
        "random",
        "cluster",
        "cluster, softness 0.1",
        "cluster, softness 0.3",
        "cluster, every second image",
    ),
    "anchors": (
        "cluster, 1 anchor",
        "cluster",
        "cluster, 7 anchors",
        "cluster, 13 anchors",
        "cluster, anchors stay",
        "cluster, 13 anchors stay",
        "cluster, 13 anchors and detail stay",
    ),
    "similarity": (
        "cluster",
        "cluster, colour",
        "cluster, raw pixels",
        "cluster, near",
        "cluster, token mix 0.5",
    ),
    "detail": (
        "random",
        "cluster",
        "cluster, softness 0.3",
        "cluster, flat anchors",
        "cluster, detail stays",
        "detail",
        "detail, strong",
    ),
    "ratio": (
        "random, ratio ramp",
        "cluster, ratio ramp",
        "random, whole end",
        "cluster, whole end",
        "cluster, then random",
        "random, then cluster",
    ),
    "background": (
        "random",
        "cluster",
        *BACKGROUNDS,
    ),
}
