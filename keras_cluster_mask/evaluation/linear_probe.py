"""Linear probe: the accuracy of a linear classifier on frozen features."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.checks import check_choice, check_integer, check_range
from keras_cluster_mask.evaluation.checks import (
    check_labels,
    check_matrix,
    class_names_of,
    read_labeled,
)
from keras_cluster_mask.evaluation.classification import classification_accuracy
from keras_cluster_mask.evaluation.embedding import embed_batches, embedder_of

# The grid of the protocol. Of equal scores, scikit-learn chooses the first.
STRENGTHS = np.logspace(6, -6, 96)
# The names in scikit-learn of the metrics that choose the strength.
SCORING = {"top_1": "accuracy", "mean_per_class": "balanced_accuracy"}
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
) -> dict[str, Any]:
    """Computes the accuracy of a logistic regression on frozen features.

    This is the protocol of CLIP (Radford et al., appendix A.3): multinomial logistic
    regression, fitted by scikit-learn's L-BFGS in float64. `LogisticRegressionCV` tries
    96 regularization strengths from 1e6 to 1e-6 on validation data. Each fit starts
    from the one before. If scores are equal, the largest strength is chosen. A final
    fit uses training and validation data. It is evaluated on the test data, which
    nothing else uses.

    Features are neither centered nor scaled, as in the paper: the strengths suit both
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
            cross-entropy summed over items. `None` chooses it on validation data.
        metric: `"top_1"`, or `"mean_per_class"` for unbalanced classes. The metric on
            the validation data that chooses the strength.
        validation_split: Float in `(0, 1)`. The fraction of the training data that is
            held out to choose the strength, of each class, rounded, but at least one
            item and not all. Each class needs at least two items.
        max_iterations: Integer. The maximum number of L-BFGS iterations in each fit.
            scikit-learn warns about fits that need more.
        seed: Integer. The seed of the validation split.

    Returns:
        A dictionary: `"top_1"`, with more than five classes `"top_5"`, and
        `"mean_per_class"`, floats in `[0, 1]` on the test data; `"regularization"`, the
        strength; and `"validation"`, a dictionary from each strength that was tried,
        the largest first, to the metric on the validation data.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: For features that are not finite or differ in width, for labels that
            do not match them,
            for a single class, for validation or test data with a class that the
            training data lacks, and for a validation split with a class of one item.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
    """
    _check_options(regularization, metric, validation_split, max_iterations)
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import PredefinedSplit

    features, labels = _check_items("train", train_features, train_labels)
    known, counts = np.unique(labels, return_counts=True)
    if len(known) < 2:
        raise ValueError(f"`train_labels` need two classes. Received: {labels[:5]}")
    is_split = validation is None and regularization is None
    if is_split and counts.min() < 2:
        raise ValueError(
            "`train_labels` must have two items or more of each class, one of them to "
            "choose the strength on; or pass `validation` or `regularization`. "
            f"Received: one item of the class {known[counts.argmin()]}"
        )
    seen = known, features.shape[1]
    test_features, test_labels = _check_items("test", test_features, test_labels, seen)
    # As scikit-learn numbers them: -1 for training, 0 for validation.
    parts = np.full(len(labels), -1)
    if validation is not None:
        held_out, held_out_labels = _check_items("validation", *validation, seen)
        parts = np.repeat([-1, 0], [len(features), len(held_out)])
        features = np.concatenate([features, held_out])
        labels = np.concatenate([labels, held_out_labels])
    elif is_split:
        rng = np.random.default_rng(seed)
        for each in known:
            rows = rng.permutation(np.flatnonzero(labels == each))
            count = np.clip(round(validation_split * len(rows)), 1, len(rows) - 1)
            parts[rows[:count]] = 0
    options = {"tol": TOLERANCE / len(known), "max_iter": max_iterations}
    if regularization is None:
        classifier = LogisticRegressionCV(
            Cs=1 / STRENGTHS,
            cv=PredefinedSplit(parts),
            scoring=SCORING[metric],
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
            **options,
        )
    else:
        classifier = LogisticRegression(C=1 / regularization, **options)
    # In float32 a fit stops early, where rounding hides changes of the loss.
    classifier.fit(features.astype("float64"), labels)
    tried = {}
    if regularization is None:
        tried = dict(zip(STRENGTHS.tolist(), classifier.scores_.ravel().tolist()))
        regularization = max(tried, key=tried.get)
    scores = classifier.decision_function(test_features)
    # With two classes, scikit-learn scores only the second.
    if scores.ndim == 1:
        scores = np.stack([-scores, scores], axis=1)
    accuracy = classification_accuracy(scores, np.searchsorted(known, test_labels))
    return {**accuracy, "regularization": float(regularization), "validation": tried}


def evaluate_linear_probe(
    model: Any,
    train: Any,
    test: Any,
    validation: Any = None,
    verbose: str | int = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Computes the accuracy of a logistic regression on image embeddings.

    Uses the L2-normalized embeddings of the shared space. Radford et al. use the
    features before the projection; pass such features to `linear_probe`.

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
            f"flowers/{part}", model, training=False,
            label_key="folder", class_names=["daisy", "rose", "tulip"],
        )
        for part in ("train", "test")
    )
    kcm.evaluation.evaluate_linear_probe(model, train, test)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone`, `MetaCLIP2Backbone` or
            `SigLIPBackbone`, or the path of a saved one.
        train: See `embed`. Batches hold `"images"` and `"labels"`, ints; other entries
            are ignored.
        test: Data of the same kind.
        validation: Data of the same kind, to choose the regularization on. `None` uses
            a validation split of `train`.
        verbose: `"auto"`, 0 or 1. Whether to show progress.
        **options: Options of `linear_probe`: `regularization`, `metric`,
            `validation_split`, `max_iterations` and `seed`.

    Returns:
        The dictionary of `linear_probe`.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: For data without labels, for an `image_text_dataset` with
            `training=True`, with other `class_names` than its labels or than `train`,
            or for one of several processes, and in the cases of `linear_probe`.
    """
    # Checked before embedding, which may take hours.
    _check_options(**options)
    names = class_names_of(train)
    given = {"train": train, "test": test}
    if validation is not None:
        given["validation"] = validation
    batches = {name: read_labeled(name, data, names) for name, data in given.items()}
    embedder = embedder_of(model)
    items = {}
    for name, data in given.items():
        found = embed_batches(
            embedder, data, batches[name], tokenizer=None, verbose=verbose
        )
        items[name] = found["image_embeddings"], found["labels"]
    train, test = items["train"], items["test"]
    return linear_probe(*train, *test, items.get("validation"), **options)


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
        check_range("regularization", regularization, 1e-6, 1e6)
    check_choice("metric", metric, ("top_1", "mean_per_class"))
    check_range("validation_split", validation_split, 1e-6, 1, "[)")
    check_integer("max_iterations", max_iterations)
    check_integer("seed", seed, 0)


def _check_items(name, features, labels, seen=None):
    """Returns features and labels, after a check that they match.

    Args:
        name: String, the name of the part of the data in errors.
        features: `(items, d)` array.
        labels: `(items,)` ints.
        seen: The classes and the width of the training data, or `None` for it.
    """
    features = check_matrix(f"{name}_features", features)
    labels = check_labels(f"{name}_labels", labels, len(features))
    known, width = seen or (labels, features.shape[1])
    if features.shape[1] != width:
        raise ValueError(
            f"`{name}_features` must be as wide as `train_features`. Received: "
            f"{features.shape[1]} columns instead of {width}"
        )
    unknown = np.setdiff1d(labels, known)
    if len(unknown):
        raise ValueError(
            f"`{name}_labels` must be classes that occur in `train_labels`. Received: "
            f"{len(unknown)} others, the first {unknown[:5].tolist()}"
        )
    return features, labels
