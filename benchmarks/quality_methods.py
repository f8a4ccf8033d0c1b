"""The methods of `quality.py`: ways to train on fewer tokens, each by its name."""

import dataclasses
from collections.abc import Callable

import keras_cluster_mask as kcm


@dataclasses.dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Args:
        masking: Function from a patch size to a masking, or `None` for whole images.
        text_masking: Function from the captions of the training data to a text
            masking, or to `None`, which truncates. Texts are then cut to
            `--short-context`. `None`: whole texts.
        encoder_masking: Function from the image encoder and the number of training
            steps to a masking, in place of `masking`.
        token_masking: Function from the share of the tokens that stays to a masking
            within the text encoder, where tokens keep their positions.
        whole_texts: How many of the eight parts of a run read whole texts, at its end.
        image_scale: The side of the images that the model reads, over the full side.
        views: How many masked views of each image a step trains on.
        sampling: Function from the embeddings of the training images, which are small
            copies of them, and their keys to a sampling of the data.
        equal_time: Whether to train for as long as `random` takes, rather than for as
            many steps.
    """

    masking: Callable | None = None
    text_masking: Callable | None = None
    token_masking: Callable | None = None
    whole_texts: int = 0
    image_scale: float = 1.0
    views: int = 1
    sampling: Callable | None = None
    encoder_masking: Callable | None = None
    equal_time: bool = False


def random(patch_size):
    return kcm.RandomMasking(0.5)


def threshold(patch_size, **options):
    # `quality.py` calls `adapt` on training images.
    return kcm.ClusterMasking(patch_size, 0.6, min_mask_ratio=0.5, **options)


def attentive(encoder, steps):
    return kcm.AttentiveMasking(kcm.models.MomentumEncoder(encoder, steps=steps))


def tagger(words):
    import nltk  # With its tagger: nltk.download("averaged_perceptron_tagger_eng").

    return [tag for _, tag in nltk.pos_tag(words)]


def concepts(captions):
    # A stage is a quarter of the 59 epochs on Flickr8k.
    graph = kcm.data.co_occurrence_graph(captions)
    return kcm.data.ConceptTextMasking(graph, captions, epochs_per_stage=15)


# Each keeps half of the patches, except where it says so.
METHODS = {
    "none": Method(),
    "none, equal time": Method(equal_time=True),
    "resized": Method(image_scale=0.75),
    "random": Method(random),
    "cluster": Method(lambda p: kcm.ClusterMasking(p, 0.5)),
    "cluster, softness 0.3": Method(lambda p: kcm.ClusterMasking(p, softness=0.3)),
    "cluster, token mix 0.5": Method(
        lambda p: kcm.ClusterMasking(p, embedding_weight=0.5)
    ),
    "threshold": Method(threshold),
    "threshold, fill-in": Method(lambda p: threshold(p, hide_padding=False)),
    "centered": Method(lambda p: kcm.CenteredMasking(0.5)),
    "block": Method(lambda p: kcm.BlockMasking(0.5)),
    "k-means": Method(lambda p: kcm.KMeansMasking(p, 0.5)),
    "edges": Method(lambda p: kcm.EdgeMasking(p, 0.5)),
    "attentive": Method(encoder_masking=attentive),
    "random, two views": Method(random, views=2),
    "random, samples by clusters": Method(
        random, sampling=kcm.data.ClusterSampling.from_embeddings
    ),
    "random, samples by words": Method(
        random, sampling=lambda embeddings, keys: kcm.data.FrequencyPruning(0.5)
    ),
    # A grid of 2 x 2 keeps a quarter.
    "random, quarter": Method(lambda p: kcm.RandomMasking(0.75)),
    "grid, quarter": Method(lambda p: kcm.GridMasking(2)),
    "random, tokens at their positions": Method(
        random, token_masking=lambda share: kcm.RandomMasking(1 - share)
    ),
}

# Which words stay, of captions that are longer than `--short-context`.
WORDS = {
    "first words": lambda captions: None,
    "random words": lambda captions: kcm.data.RandomTextMasking(),
    "neighbouring words": lambda captions: kcm.data.BlockTextMasking(),
    "rare words": lambda captions: kcm.data.FrequencyTextMasking().fit(captions),
    "concepts": concepts,
    "nouns first": lambda captions: kcm.data.SyntaxTextMasking(tagger),
}
for words, masking in WORDS.items():
    METHODS[f"random, {words}"] = Method(random, masking)
    METHODS[f"random, {words}, then all"] = Method(random, masking, whole_texts=1)

# Without the one that needs NLTK.
WORDS_OF_STUDY = [words for words in WORDS if words != "nouns first"]
STUDIES = {
    "images": (
        "none",
        "none, equal time",
        "resized",
        "random",
        "cluster",
        "threshold",
        "centered",
        "block",
        "k-means",
        "edges",
        "attentive",
        "random, two views",
        "random, samples by clusters",
        "random, samples by words",
        "random, quarter",
        "grid, quarter",
    ),
    "texts": (
        "random",
        "random, tokens at their positions",
        *(f"random, {words}" for words in WORDS_OF_STUDY),
        *(f"random, {words}, then all" for words in WORDS_OF_STUDY),
    ),
}
