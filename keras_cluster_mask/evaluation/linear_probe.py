"""Linear probe: how far a linear classifier gets on frozen features."""

import math
import warnings

import numpy as np

from keras_cluster_mask.evaluation.checks import check_embeddings
from keras_cluster_mask.evaluation.classification import (
    classification_accuracy,
    labelled,
)
from keras_cluster_mask.evaluation.embedding import (
    Embedder,
    Progress,
    embed,
)
from keras_cluster_mask.evaluation.regularization import (
    NUM_FITS,
    class_scores,
    fit,
    has_converged,
    scikit_learn,
    search,
    split,
)

METRICS = "top_1", "mean_per_class"


def linear_probe(
    train_features,
    train_labels,
    test_features,
    test_labels,
    validation=None,
    regularization=None,
    metric="top_1",
    validation_split=0.2,
    max_iterations=1000,
    seed=0,
    verbose="auto",
):
    """How well a logistic regression on frozen features classifies.

    The protocol of CLIP (Radford et al., appendix A.3): multinomial logistic
    regression, fitted by scikit-learn's L-BFGS. How strongly it is regularised is
    chosen on validation data by a search from 1e-6 to 1e6: every second power of ten,
    then around the best ever closer, to an eighth of a decade; of strengths that do
    equally well the strongest is taken. Then it is fitted once more, on training and
    validation data, and judged on the test data, which has had no part in anything.

    Features are taken as they are, neither centred nor scaled, as in the paper: the
    search covers both embeddings of length 1 and larger features.

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
        train_features: `(items, d)` array, computed with in float32.
        train_labels: `(items,)` ints, any numbers, at least two different ones.
        test_features: `(items, d)` array.
        test_labels: `(items,)` ints that `train_labels` holds too.
        validation: A pair `(features, labels)` to choose the strength on. By default a
            part of the training data.
        regularization: Float. The strength, if it is not to be searched for: the factor
            of half the squared weights beside the cross-entropy summed over items, that
            is, 1 / `C` of scikit-learn.
        metric: `"top_1"`, or `"mean_per_class"` for unbalanced classes. What is to be
            highest on the validation data.
        validation_split: Float. The share of each class that is split off for
            validation, where `validation` is not given: at least one item of a class of
            two or more, never all.
        max_iterations: Integer, of L-BFGS in each fit.
        seed: Integer. What is split off depends on it, and nothing else does.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        A dictionary: `"top_1"`, with more than five classes `"top_5"`, and
        `"mean_per_class"`, floats in `[0, 1]` on the test data;
        `"regularization"`, the strength; `"validation"`, a dictionary from each
        strength that was tried to the metric on the validation data; and
        `"unconverged"`, a list of the strengths whose fits were cut off at
        `max_iterations`. If the last one was, a warning says so too.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: For features that are not finite or not of one width, for labels
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
            "`train_labels` must be of at least two classes. "
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
    progress = Progress(verbose, 1 + (NUM_FITS if regularization is None else 0), "fit")
    unconverged = set()

    def fitted(items, strength):
        classifier = fit(*items, strength, max_iterations)
        progress.add(1)
        if not has_converged(classifier):
            unconverged.add(strength)
        return classifier

    strength, tried = regularization, {}
    if strength is None:
        part, held_out = (
            split(*train, validation_split, seed)
            if validation is None
            else (train, validation)
        )

        def score(strength):
            scores = class_scores(fitted(part, strength), held_out[0])
            return classification_accuracy(scores, held_out[1])[metric]

        strength, tried = search(score)
        # At the ends of the range there is less to try.
        progress.add(NUM_FITS - len(tried))
    if validation is not None:
        train = [np.concatenate(both) for both in zip(train, validation)]
    classifier = fitted(train, strength)
    if not has_converged(classifier):
        warnings.warn(
            f"The last fit did not converge in {max_iterations} iterations "
            f"(`max_iterations`) at a regularization of {strength:.3g}.",
            stacklevel=2,
        )
    scores = class_scores(classifier, test[0])
    return {
        **classification_accuracy(scores, test[1]),
        "regularization": float(strength),
        "validation": dict(sorted(tried.items())),
        "unconverged": sorted(unconverged),
    }


def evaluate_linear_probe(
    model,
    train,
    test,
    validation=None,
    regularization=None,
    metric="top_1",
    validation_split=0.2,
    max_iterations=1000,
    seed=0,
    verbose="auto",
):
    """How well a logistic regression on a model's image embeddings classifies.

    The embeddings are those of the common space, L2-normalised. Radford et al. probe
    the features before the projection into it; pass any such to `linear_probe`.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    images = np.random.randint(0, 256, (30, 32, 32, 3)).astype("uint8")
    labels = np.arange(30) % 3
    train, test = (images[:20], labels[:20]), (images[20:], labels[20:])
    kcm.evaluation.evaluate_linear_probe(backbone, train, test)["top_1"]  # 0.3
    ```

    Pictures in a folder for each class:

    ```
    train, test = (
        kcm.data.ImageTextBatches(
            f"flowers/{part}", None, 224, 64, training=False,
            label_key="folder", class_names=["daisy", "rose", "tulip"],
        )
        for part in ("train", "test")
    )
    kcm.evaluation.evaluate_linear_probe(model, train, test)
    ```

    Args:
        model: A `ContrastiveModel`, a keras_hub `CLIPBackbone` or `SigLIPBackbone`, or
            the path of one that was saved.
        train: See `embed`. Batches hold `"images"` and `"labels"`, ints; what else they
            hold is not looked at.
        test: Data likewise.
        validation: Data likewise, to choose the regularisation on. By default a part of
            `train`.
        regularization: See `linear_probe`.
        metric: See `linear_probe`.
        validation_split: See `linear_probe`.
        max_iterations: See `linear_probe`.
        seed: See `linear_probe`.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        A dictionary, as `linear_probe` returns it.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: For data without labels, and for what `linear_probe` does not take.
    """
    # Before hours of embedding.
    _check_options(regularization, metric, validation_split, max_iterations)
    embedder = Embedder.of(model)
    given = {"train": train, "test": test, "validation": validation}
    items = {
        name: _embed_items(embedder, name, data, verbose)
        for name, data in given.items()
        if data is not None or name != "validation"
    }
    return linear_probe(
        *items["train"],
        *items["test"],
        items.get("validation"),
        regularization,
        metric,
        validation_split,
        max_iterations,
        seed,
        verbose,
    )


def _embed_items(embedder, name, data, verbose):
    found = embed(embedder, labelled(data, name=name), verbose=verbose)
    return found["image_embeddings"], found["labels"]


def _check_options(regularization, metric, validation_split, max_iterations):
    scikit_learn()
    if regularization is not None and not 0 < regularization < math.inf:
        raise ValueError(
            "`regularization` must be a positive float, or None to search for it. "
            f"Received: regularization={regularization}"
        )
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {METRICS}. Received: {metric!r}")
    if not 0 < validation_split < 1:
        raise ValueError(
            "`validation_split` must be between 0 and 1. "
            f"Received: validation_split={validation_split}"
        )
    if max_iterations < 1:
        raise ValueError(
            "`max_iterations` must be at least 1. "
            f"Received: max_iterations={max_iterations}"
        )


def _check_items(name, features, labels, train=None):
    features = check_embeddings(f"{name}_features", features)
    labels = np.asarray(labels)
    if labels.shape != (len(features),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}_labels` must be ints of shape ({len(features)},), a class for "
            f"each item. Received: {name}_labels of shape {labels.shape} and type "
            f"{labels.dtype}"
        )
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
            f"`{name}_labels` must be classes that `train_labels` holds. Received: "
            f"{len(unknown)} others, the first of them {unknown[:5].tolist()}"
        )
    return features, labels
