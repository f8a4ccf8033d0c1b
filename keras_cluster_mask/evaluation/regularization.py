"""Logistic regressions, and how strongly to regularise them."""

import warnings

import numpy as np

# What is chosen from, eight strengths a decade; every sixteenth is tried first.
STRENGTHS = [10.0 ** (exponent / 8) for exponent in range(-48, 49)]
COARSE = 16
# In a search: the first seven, then two at a distance of 8, 4, 2 and 1.
NUM_FITS = 7 + 2 * 4


def scikit_learn():
    """scikit-learn's `LogisticRegression` and `ConvergenceWarning`."""
    # Nothing else of the library needs it.
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "A linear probe is fitted by scikit-learn, which cannot be imported "
            f"({error}): `pip install scikit-learn`."
        ) from error
    return LogisticRegression, ConvergenceWarning


def fit(features, labels, strength, max_iterations):
    """A `LogisticRegression` whose warnings are left to `has_converged`.

    Args:
        features: `(items, d)` array.
        labels: `(items,)` ints.
        strength: Float. The factor of half the squared weights beside the sum of the
            cross-entropies.
        max_iterations: Integer.
    """
    LogisticRegression, ConvergenceWarning = scikit_learn()
    classifier = LogisticRegression(C=1 / strength, max_iter=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(features, labels)


def has_converged(classifier):
    """Whether a fit ended before the iterations did."""
    return max(classifier.n_iter_) < classifier.max_iter


def class_scores(classifier, features):
    """`(items, classes)` scores."""
    scores = classifier.decision_function(features)
    # Of two classes scikit-learn scores the second alone.
    return scores if scores.ndim == 2 else np.stack([-scores, scores], axis=1)


def search(score):
    """The strength of the highest score, and the scores of all that were tried.

    Seven strengths first, then those next to the best, ever closer. Of equal scores
    that of the strongest counts.

    Args:
        score: Function of a strength.

    Returns:
        Tuple of the strength and a dictionary from strengths to scores.
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


def split(features, labels, share, seed):
    """Splits a part off each class, for validation.

    Args:
        features: `(items, d)` array.
        labels: `(items,)` ints from 0; none between them is missing.
        share: Float.
        seed: Integer.

    Returns:
        Two pairs of features and labels: the rest, which holds all classes, and the
        part, which holds all but those of one item.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    held_out = np.zeros(len(labels), bool)
    for rows in np.split(order, np.cumsum(np.bincount(labels))[:-1]):
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        held_out[rows[:count]] = True
    if not held_out.any():
        raise ValueError(
            "`train_labels` must hold a class twice for a part to be split off; pass "
            f"`validation` or `regularization` otherwise. Received: {len(labels)} "
            "classes of one item each"
        )
    return tuple((features[rows], labels[rows]) for rows in (~held_out, held_out))
