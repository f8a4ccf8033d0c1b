"""Linear probe: the accuracy of a linear classifier on frozen features."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from keras_cluster_mask.checks import check_choice, check_integer, check_range
from keras_cluster_mask.distribution.processes import verbosity
from keras_cluster_mask.evaluation.checks import (
    check_labels,
    check_matrix,
    class_names_of,
    read_labeled,
)
from keras_cluster_mask.evaluation.classification import classification_accuracy
from keras_cluster_mask.evaluation.embedding import Embedder, embed_batches

# The candidate strengths, eight per decade, and the step sizes of the search.
STRENGTHS = [10.0 ** (exponent / 8) for exponent in range(-48, 49)]
STEPS = 16, 8, 4, 2, 1
# The largest gradient of a converged fit, times the number of classes. scikit-learn
# minimizes the mean loss over items, so gradients shrink with the number of classes:
# with the default of 1e-4, a fit of a thousand classes stops where it starts.
TOLERANCE = 1e-5


def linear_probe(
    train_features: np.ndarray,
    train_labels: Sequence | np.ndarray,
    test_features: np.ndarray,
    test_labels: Sequence | np.ndarray,
    validation: tuple[np.ndarray, Sequence | np.ndarray] | None = None,
    regularization: float | None = None,
    metric: str = "top_1",
    validation_split: float = 0.2,
    max_iterations: int = 1000,
    seed: int = 0,
    verbose: str | int = "auto",
) -> dict[str, Any]:
    """Computes the accuracy of a logistic regression on frozen features.

    This is the protocol of CLIP (Radford et al., appendix A.3): multinomial logistic
    regression, fitted by scikit-learn's L-BFGS in float64. The regularization strength
    is chosen on validation data by a search from 1e-6 to 1e6: first every second power
    of ten, then smaller steps around the best, down to an eighth of a decade. If scores
    are equal, the largest strength is chosen. A final fit uses training and validation
    data, and is evaluated on the test data, which nothing else depends on.

    Features are neither centered nor scaled, as in the paper: the search covers both
    embeddings of length 1 and larger features.

    Example:

    ```python
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, 16))
    train_labels, test_labels = np.arange(60) % 3, np.arange(30) % 3
    train_features = centers[train_labels] + rng.normal(size=(60, 16))
    test_features = centers[test_labels] + rng.normal(size=(30, 16))
    found = kcm.evaluation.linear_probe(
        train_features, train_labels, test_features, test_labels
    )
    found["top_1"]  # 0.97
    ```

    Args:
        train_features: `(items, d)` array, cast to float32.
        train_labels: `(items,)` ints, any numbers, at least two classes.
        test_features: `(items, d)` array.
        test_labels: `(items,)` ints. Each class must occur in `train_labels`.
        validation: A pair `(features, labels)` to choose the strength on. `None` uses
            a validation split of the training data.
        regularization: Float in `[1e-6, 1e6]`. The strength, scikit-learn's 1 / `C`:
            half the sum of squared weights is multiplied by it and added to the
            cross-entropy summed over items. `None` searches for it.
        metric: `"top_1"`, or `"mean_per_class"` for unbalanced classes. The metric on
            the validation data that the search maximizes.
        validation_split: Float in `(0, 1]`. The share of each class that is held out to
            choose the strength. One item of each class stays in training.
        max_iterations: Integer. The maximum number of L-BFGS iterations in each fit.
            scikit-learn warns of fits that need more.
        seed: Integer. The seed of the validation split.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        A dictionary: `"top_1"`, with more than five classes `"top_5"`, and
        `"mean_per_class"`, floats in `[0, 1]` on the test data; `"regularization"`, the
        strength; and `"validation"`, a dictionary from each strength that was tried to
        the metric on the validation data.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: For features that are not finite, for labels that do not match them,
            for a single class, for validation or test data with a class that the
            training data lacks, and for a split of classes of one item each.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
    """
    _check_options(regularization, metric, validation_split, max_iterations)
    from sklearn.linear_model import LogisticRegression

    train = _check_items("train", train_features, train_labels)
    test = _check_items("test", test_features, test_labels, train)
    if validation is not None:
        validation = _check_items("validation", *validation, train)
    strength, tried = regularization, {}
    progress = tqdm(desc="Linear probe", unit=" fits", disable=not verbosity(verbose))

    def fit(features, labels, strength):
        tolerance = TOLERANCE / len(np.unique(labels))
        classifier = LogisticRegression(
            C=1 / strength, tol=tolerance, max_iter=max_iterations
        )
        # In float32 a fit stops early, where rounding hides changes of the loss.
        classifier.fit(features.astype("float64"), labels)
        progress.update()
        return classifier

    if strength is None:
        part, held_out = train, validation
        if validation is None:
            part, held_out = stratified_split(*train, validation_split, seed)
        for step in STEPS:
            for strength in next_strengths(tried, step):
                tried[strength] = _accuracy(fit(*part, strength), *held_out)[metric]
        strength = best_strength(tried)
    if validation is not None:
        train = [np.concatenate(both) for both in zip(train, validation)]
    accuracy = _accuracy(fit(*train, strength), *test)
    progress.close()
    return {
        **accuracy,
        "regularization": float(strength),
        "validation": dict(sorted(tried.items())),
    }


def evaluate_linear_probe(
    model: Any,
    train: Any,
    test: Any,
    validation: Any = None,
    verbose: str | int = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Computes the accuracy of a logistic regression on image embeddings.

    The embeddings are the L2-normalized ones of the shared space. Radford et al. use
    the features before the projection; pass such features to `linear_probe`.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    images = np.random.randint(0, 256, (30, 32, 32, 3)).astype("uint8")
    labels = np.arange(30) % 3
    train, test = (images[:20], labels[:20]), (images[20:], labels[20:])
    kcm.evaluation.evaluate_linear_probe(backbone, train, test)["top_1"]  # 0.3
    ```

    Images in a folder for each class:

    ```
    train, test = (
        kcm.data.image_text_dataset(
            f"flowers/{part}", None, 224, 64, training=False,
            label_key="folder", class_names=["daisy", "rose", "tulip"],
        )
        for part in ("train", "test")
    )
    kcm.evaluation.evaluate_linear_probe(model, train, test)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of one that was saved.
        train: See `embed`. Batches hold `"images"` and `"labels"`, ints; other entries
            are ignored.
        test: Data of the same kind.
        validation: Data of the same kind, to choose the regularization on. `None` uses
            a validation split of `train`.
        verbose: `"auto"`, 0 or 1. Whether to show progress.
        **options: Options of `linear_probe`: `regularization`, `metric`,
            `validation_split`, `max_iterations` and `seed`.

    Returns:
        A dictionary, as `linear_probe` returns it.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: For data without labels, for an `image_text_dataset` with
            `training=True`, with other `class_names` than its labels, or of one of
            several processes, and as `linear_probe` does.
    """
    # Checked before embedding, which may take hours.
    _check_options(**options)
    given, names = {"train": train, "test": test}, class_names_of(train)
    if validation is not None:
        given["validation"] = validation
    parts = [(data, read_labeled(name, data, names)) for name, data in given.items()]
    embedder = Embedder.of(model)
    found = [embed_batches(embedder, *part, None, verbose) for part in parts]
    items = [(each["image_embeddings"], each["labels"]) for each in found]
    return linear_probe(*items[0], *items[1], *items[2:], verbose=verbose, **options)


def next_strengths(tried: dict[float, float], step: int) -> list[float]:
    """Returns the strengths to try next: every `step`-th, then those next to the best.

    Args:
        tried: Dictionary from the strengths that were tried to scores.
        step: Integer, the distance between strengths, in eighths of a decade.
    """
    if not tried:
        return STRENGTHS[::step]
    peak = STRENGTHS.index(best_strength(tried))
    around = peak - step, peak + step
    return [STRENGTHS[index] for index in around if 0 <= index < len(STRENGTHS)]


def best_strength(tried: dict[float, float]) -> float:
    """Returns the strength with the highest score; among equal scores the largest."""
    return max(tried, key=lambda strength: (tried[strength], strength))


def _accuracy(classifier, features, labels):
    scores = classifier.decision_function(features)
    # With two classes, scikit-learn scores only the second.
    scores = scores if scores.ndim == 2 else np.stack([-scores, scores], axis=1)
    return classification_accuracy(scores, np.searchsorted(classifier.classes_, labels))


def stratified_split(features, labels, share, seed):
    """Splits items into two pairs of features and labels: training and validation."""
    held_out = np.zeros(len(labels), bool)
    order = np.random.default_rng(seed).permutation(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        held_out[rows[: min(math.ceil(share * len(rows)), len(rows) - 1)]] = True
    if not held_out.any():
        raise ValueError(
            "`train_labels` must hold a class of two items or more for a validation "
            "split; pass `validation` or `regularization` otherwise. Received: "
            f"{len(labels)} classes of one item each"
        )
    return tuple((features[part], labels[part]) for part in (~held_out, held_out))


def _check_options(
    regularization=None, metric="top_1", validation_split=0.2, max_iterations=1, seed=0
):
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "A linear probe needs the extra `probe`: `pip install scikit-learn`."
        ) from error
    if regularization is not None:
        check_range("regularization", regularization, STRENGTHS[0], STRENGTHS[-1])
    check_choice("metric", metric, ("top_1", "mean_per_class"))
    check_range("validation_split", validation_split, 0, 1, "(]")
    check_integer("max_iterations", max_iterations)


def _check_items(name, features, labels, train=None):
    features = check_matrix(f"{name}_features", features)
    labels = check_labels(f"{name}_labels", labels, len(features))
    if train is None and len(np.unique(labels)) < 2:
        raise ValueError(f"`{name}_labels` need two classes. Received: {labels[:5]}")
    if train is None:
        return features, labels
    unknown = np.setdiff1d(labels, train[1])
    if len(unknown):
        raise ValueError(
            f"`{name}_labels` must be classes that occur in `train_labels`. Received: "
            f"{len(unknown)} others, the first {unknown[:5].tolist()}"
        )
    return features, labels
