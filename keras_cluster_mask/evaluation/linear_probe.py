"""Linear probe: the accuracy of a linear classifier on frozen features."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_cluster_mask.checks import check_choice, check_integer, is_positive
from keras_cluster_mask.evaluation.checks import (
    check_labels,
    check_matrix,
    check_read_once,
)
from keras_cluster_mask.evaluation.classification import (
    classification_accuracy,
    labeled,
)
from keras_cluster_mask.evaluation.embedding import Embedder, embed

# The candidates, eight strengths a decade; every sixteenth is tried first.
STRENGTHS = [10.0 ** (exponent / 8) for exponent in range(-48, 49)]
COARSE = 16
# In a search: the first seven, then two at a distance of 8, 4, 2 and 1.
NUM_FITS = 7 + 2 * 4
METRICS = "top_1", "mean_per_class"


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
    """Measures how well a logistic regression on frozen features classifies.

    The protocol of CLIP (Radford et al., appendix A.3): multinomial logistic
    regression, fitted by scikit-learn's L-BFGS. The regularization strength is chosen
    on validation data by a search from 1e-6 to 1e6: every second power of ten, then
    around the best in smaller steps, down to an eighth of a decade. Of strengths with
    equal scores the strongest is chosen. A final fit uses training and validation
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
        regularization: Float. The strength, 1 / `C` of scikit-learn: the factor of half
            the squared weights beside the cross-entropy summed over items. `None`
            searches for it.
        metric: `"top_1"`, or `"mean_per_class"` for unbalanced classes. The metric on
            the validation data that the search maximizes.
        validation_split: Float up to 0.5. The share of the training data in the
            validation split, stratified by class, and at least as many items as
            classes. Classes of one item stay in training.
        max_iterations: Integer. The maximum number of L-BFGS iterations in each fit.
        seed: Integer. The seed of the validation split.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        A dictionary: `"top_1"`, with more than five classes `"top_5"`, and
        `"mean_per_class"`, floats in `[0, 1]` on the test data;
        `"regularization"`, the strength; `"validation"`, a dictionary from each
        strength that was tried to the metric on the validation data; and
        `"unconverged"`, a list of the strengths whose fits stopped at
        `max_iterations`. If the final fit is one of them, a warning is issued.

    Raises:
        ValueError: For features that are not finite or differ in width, for labels
            that do not fit them, for a single class, and for validation or test data
            of a class that the training data lacks.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
    """
    _check_options(regularization, metric, validation_split, max_iterations)
    train = _check_items("train", train_features, train_labels)
    test = _check_items("test", test_features, test_labels, train)
    classes = np.unique(train[1])
    if len(classes) < 2:
        raise ValueError(
            "`train_labels` must hold at least two classes. "
            f"Received: class {classes[0]} alone"
        )
    if validation is not None:
        if not isinstance(validation, tuple | list) or len(validation) != 2:
            raise ValueError(
                "`validation` must be a pair (features, labels). "
                f"Received: {type(validation).__name__}"
            )
        validation = _check_items("validation", *validation, train)
    train, test, validation = (
        items and (items[0], np.searchsorted(classes, items[1]))
        for items in (train, test, validation)
    )
    total = NUM_FITS + 1 if regularization is None else 1
    progress = keras.utils.Progbar(total, verbose=bool(verbose), unit_name="fit")
    unconverged = set()

    def fitted(items, strength):
        classifier = _fit(*items, strength, max_iterations)
        progress.add(1)
        if not _has_converged(classifier):
            unconverged.add(strength)
        return classifier

    strength, tried = regularization, {}
    if strength is None:
        part, held_out = train, validation
        if validation is None:
            part, held_out = _split(*train, validation_split, seed)

        def score(strength):
            scores = _class_scores(fitted(part, strength), held_out[0])
            return classification_accuracy(scores, held_out[1])[metric]

        strength, tried = search(score)
        # At the ends of the range there is less to try.
        progress.add(NUM_FITS - len(tried))
    if validation is not None:
        train = [np.concatenate(both) for both in zip(train, validation)]
    classifier = fitted(train, strength)
    if not _has_converged(classifier):
        warnings.warn(
            f"The final fit did not converge in {max_iterations} iterations "
            f"(`max_iterations`) at a regularization of {strength:.3g}.",
            stacklevel=2,
        )
    scores = _class_scores(classifier, test[0])
    return {
        **classification_accuracy(scores, test[1]),
        "regularization": float(strength),
        "validation": dict(sorted(tried.items())),
        "unconverged": sorted(unconverged),
    }


def evaluate_linear_probe(
    model: Any,
    train: Any,
    test: Any,
    validation: Any = None,
    regularization: float | None = None,
    metric: str = "top_1",
    validation_split: float = 0.2,
    max_iterations: int = 1000,
    seed: int = 0,
    verbose: str | int = "auto",
) -> dict[str, Any]:
    """Measures how well a logistic regression on image embeddings classifies.

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
        regularization: See `linear_probe`.
        metric: See `linear_probe`.
        validation_split: See `linear_probe`.
        max_iterations: See `linear_probe`.
        seed: See `linear_probe`.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        A dictionary, as `linear_probe` returns it.

    Raises:
        ValueError: For data without labels, for an `image_text_dataset` with
            `training=True`, and as `linear_probe` does.
    """
    options = regularization, metric, validation_split, max_iterations
    # Checked before embedding, which may take hours.
    _check_options(*options)
    given = {"train": train, "test": test, "validation": validation}
    for name, data in given.items():
        check_read_once(name, data)
    embedder = Embedder.of(model)
    items = dict.fromkeys(given)
    for name, data in given.items():
        if data is not None or name != "validation":
            found = embed(embedder, labeled(data, name=name), verbose=verbose)
            items[name] = found["image_embeddings"], found["labels"]
    train, test, validation = items.values()
    return linear_probe(*train, *test, validation, *options, seed, verbose)


def search(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Searches for the strength with the highest score.

    Seven strengths first, then those next to the best in smaller steps. Of equal scores
    the one of the strongest regularization counts.

    Args:
        score: Function of a strength.

    Returns:
        Tuple of the strength and a dictionary from all strengths tried to scores.
    """
    tried = {}
    indices, step = range(0, len(STRENGTHS), COARSE), COARSE
    while step:
        for index in indices:
            tried[index] = score(STRENGTHS[index])
        peak = max(tried, key=lambda index: (tried[index], index))
        step //= 2
        around = peak - step, peak + step
        indices = [index for index in around if 0 <= index < len(STRENGTHS)]
    return STRENGTHS[peak], {STRENGTHS[index]: tried[index] for index in sorted(tried)}


def _fit(features, labels, strength, max_iterations):
    """A `LogisticRegression`; `_has_converged` replaces its warning."""
    # Imported here, as scikit-learn takes a second and only a probe needs it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(C=1 / strength, max_iter=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(features, labels)


def _has_converged(classifier):
    return max(classifier.n_iter_) < classifier.max_iter


def _class_scores(classifier, features):
    """`(items, classes)` scores."""
    scores = classifier.decision_function(features)
    # Of two classes scikit-learn scores the second alone.
    return scores if scores.ndim == 2 else np.stack([-scores, scores], axis=1)


def _split(features, labels, share, seed):
    """Two pairs of features and labels: for training, with all classes, and the rest.

    Labels are ints from 0 without gaps.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels)
    # scikit-learn refuses to split a class of one item.
    rows = np.flatnonzero(counts[labels] > 1)
    if not len(rows):
        raise ValueError(
            "`train_labels` must hold a class of two items or more for a validation "
            "split; pass `validation` or `regularization` otherwise. Received: "
            f"{len(labels)} classes of one item each"
        )
    # At most a half leaves an item of each class in training.
    size = max(round(share * len(rows)), np.count_nonzero(counts > 1))
    size = min(size, len(rows) // 2)
    _, validation = train_test_split(
        rows, test_size=size, stratify=labels[rows], random_state=seed
    )
    held_out = np.isin(np.arange(len(labels)), validation)
    return tuple((features[part], labels[part]) for part in (~held_out, held_out))


def _check_options(regularization, metric, validation_split, max_iterations):
    if regularization is not None and not is_positive(regularization):
        raise ValueError(
            "`regularization` must be a positive float, or None to search for it. "
            f"Received: regularization={regularization}"
        )
    check_choice("metric", metric, METRICS)
    check_integer("max_iterations", max_iterations, 1)
    if not 0 < validation_split <= 0.5:
        raise ValueError(
            "`validation_split` must be above 0 and at most 0.5. "
            f"Received: validation_split={validation_split}"
        )


def _check_items(name, features, labels, train=None):
    features = check_matrix(f"{name}_features", features)
    labels = check_labels(f"{name}_labels", labels, len(features))
    if train is None:
        return features, labels
    if features.shape[1] != train[0].shape[1]:
        raise ValueError(
            f"`{name}_features` must be as wide as `train_features`. Received: "
            f"{name}_features.shape={features.shape}, "
            f"train_features.shape={train[0].shape}"
        )
    unknown = np.setdiff1d(labels, train[1])
    if len(unknown):
        raise ValueError(
            f"`{name}_labels` must be classes that occur in `train_labels`. Received: "
            f"{len(unknown)} others, the first {unknown[:5].tolist()}"
        )
    return features, labels
