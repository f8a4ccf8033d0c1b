"""The methods of `quality.py`: ways to train on fewer tokens, each by its name.

A name says which patches stay and, after commas, what else differs:
`"cluster, random words, whole texts last"`.
"""

import dataclasses
from collections.abc import Callable

import keras_cluster_mask as kcm


@dataclasses.dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Args:
        masking: Function from a patch size and a mask ratio to a masking, or `None`
            for whole images.
        mask_ratio: The share of the patches to leave out.
        text_masking: Function from the captions of the training data to a text
            masking, or to `None`, which truncates. Texts are then cut to
            `short_context`. `None`: whole texts.
        short_context: Tokens of a masked text, `--short-context` if it is `None`.
        whole_texts: Whether the last eighth of the training reads whole texts.
        whole_images: Whether the last eighth of the training reads whole images, with
            an optimizer of its own.
        image_scale: The side of the images that the model reads, over the full side.
        equal_time: Whether to train for as long as `random` takes, rather than for as
            many steps.
    """

    masking: Callable | None = None
    mask_ratio: float = 0.5
    text_masking: Callable | None = None
    short_context: int | None = None
    whole_texts: bool = False
    whole_images: bool = False
    image_scale: float = 1.0
    equal_time: bool = False

    def __post_init__(self):
        if (self.short_context or self.whole_texts) and not self.text_masking:
            raise ValueError(
                "`short_context` and `whole_texts` must come with a `text_masking`, as "
                f"texts are whole without it. Received: {self}"
            )

    def new_masking(self, patch_size):
        """A new masking of images, or `None`."""
        return self.masking and self.masking(patch_size, self.mask_ratio)

    @property
    def ends_differently(self):
        """Whether the last eighth of the training differs from the rest."""
        return self.whole_texts or self.whole_images


def threshold(patch_size, mask_ratio, **options):
    """As in the paper's comparison: 30 to 100 % of an image, 50 % on average."""
    # `quality.py` calls `adapt` on training images.
    return kcm.ClusterMasking(
        mask_ratio, patch_size=patch_size, min_mask_ratio=0.6 * mask_ratio, **options
    )


def has_threshold(masking):
    """Whether a masking has a threshold that is adapted to the data."""
    return isinstance(masking, kcm.ClusterMasking) and masking.threshold is not None


# Which patches stay: the first word of a name.
PATCHES = {
    "none": Method(),
    "resized": Method(image_scale=0.75),
    "random": Method(lambda p, r: kcm.RandomMasking(r)),
    "cluster": Method(lambda p, r: kcm.ClusterMasking(r, patch_size=p)),
    "softer cluster": Method(
        lambda p, r: kcm.ClusterMasking(r, patch_size=p, softness=0.3)
    ),
    # As many clusters in 64 patches as the paper has in 196.
    "cluster of 6 anchors": Method(
        lambda p, r: kcm.ClusterMasking(r, patch_size=p, anchor_ratio=6 / 64)
    ),
    "embedding cluster": Method(
        lambda p, r: kcm.ClusterMasking(r, patch_size=p, embedding_weight=0.5)
    ),
    "threshold": Method(threshold),
    "threshold with fill-in": Method(
        lambda p, r: threshold(p, r, hide_padding=False),
    ),
    "centered": Method(lambda p, r: kcm.CenteredMasking(r)),
    "block": Method(lambda p, r: kcm.BlockMasking(r)),
    # One patch of 2 x 2.
    "grid": Method(lambda p, r: kcm.GridMasking(2), mask_ratio=0.75),
    "k-means": Method(lambda p, r: kcm.KMeansMasking(r, patch_size=p)),
    "edges": Method(lambda p, r: kcm.EdgeMasking(r, patch_size=p)),
}


# What else differs: the fields of `Method` that each change sets.
CHANGES = {
    "ratio 0.25": {"mask_ratio": 0.25},
    "ratio 0.75": {"mask_ratio": 0.75},
    # Which words stay, of captions that are longer than `short_context`.
    "12 tokens": {"short_context": 12},
    "first words": {"text_masking": lambda captions: None},
    "random words": {"text_masking": lambda captions: kcm.data.RandomTextMasking()},
    "neighboring words": {
        "text_masking": lambda captions: kcm.data.BlockTextMasking(),
    },
    "rare words": {
        "text_masking": lambda captions: kcm.data.FrequencyTextMasking().fit(captions)
    },
    # The threshold of a small dataset, in which each word is frequent.
    "rare words 1e-3": {
        "text_masking": lambda captions: kcm.data.FrequencyTextMasking(
            threshold=1e-3
        ).fit(captions)
    },
    "whole texts last": {"whole_texts": True},
    "whole images last": {"whole_images": True},
    "equal time": {"equal_time": True},
}


def method_of(name):
    """The method of a name such as `"cluster, ratio 0.75, whole images last"`."""
    patches, *changes = name.split(", ")
    if patches not in PATCHES or not set(changes) <= set(CHANGES):
        raise ValueError(
            f"A method must be one of {list(PATCHES)}, and changes, after commas, of "
            f"{list(CHANGES)}. Received: {name!r}"
        )
    fields = {}
    for change in changes:
        if set(fields) & set(CHANGES[change]):
            raise ValueError(
                "A method must not have two changes of the same kind. "
                f"Received: {name!r}"
            )
        fields |= CHANGES[change]
    if "mask_ratio" in fields and patches in ("none", "resized", "grid"):
        raise ValueError(
            "A ratio must come with a masking that takes one; a grid has that of its "
            f"windows. Received: {name!r}"
        )
    return dataclasses.replace(PATCHES[patches], **fields)


WORDS = ("first", "random", "neighboring", "rare")
STUDIES = {
    "images": tuple(PATCHES),
    "texts": (
        "random",
        *(f"random, {words} words" for words in WORDS),
        *(f"random, {words} words, whole texts last" for words in WORDS),
    ),
}
