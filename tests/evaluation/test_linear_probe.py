import sys

import numpy as np
import pytest
import threadpoolctl
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from keras_cluster_mask.evaluation import (
    classification_accuracy,
    embed,
    evaluate_linear_probe,
    linear_probe,
)
from tests.helpers import class_pairs, split

pytestmark = pytest.mark.any_backend


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More would wait for one another in fits this small."""
    with threadpoolctl.threadpool_limits(1):
        yield


def clusters(labels, seed=0, noise=1.5, width=12):
    """Features of length 1 around a center for each class."""
    centers = np.random.default_rng(0).normal(size=(labels.max() + 1, width))
    noise = noise * np.random.default_rng(seed).normal(size=(len(labels), width))
    return normalize(centers[labels] + noise).astype("float32")


# Numbers of classes with gaps between them.
NAMES = np.array([40, 3, 17, 5, 1000, 8, 11])
TRAIN, VALIDATION, TEST = np.arange(140) % 7, np.arange(70) % 7, np.arange(105) % 7
FEATURES = clusters(TRAIN, 1), clusters(VALIDATION, 2), clusters(TEST, 3)


def probe(**options):
    given = {
        "train_features": FEATURES[0],
        "train_labels": NAMES[TRAIN],
        "test_features": FEATURES[2],
        "test_labels": NAMES[TEST],
        "validation": (FEATURES[1], NAMES[VALIDATION]),
    }
    return linear_probe(**{**given, **options})


@pytest.fixture(scope="module")
def searched():
    return probe()


# === Fits ===


def reference_scores(features, labels, tested, strength):
    """Scores of another solver, in 64 bits, a column for each class."""
    classifier = LogisticRegression(
        C=1 / strength, solver="newton-cg", tol=1e-9, max_iter=10**4
    )
    return classifier.fit(features.astype("float64"), labels).predict_log_proba(tested)


@pytest.mark.parametrize(
    ("num_classes", "items", "noise", "strength"),
    [
        (2, 20, 3.0, 0.5),
        (10, 20, 1.5, 1e-2),
        (10, 20, 1.5, 1.0),
        (200, 5, 1.0, 1.0),
        (1000, 2, 0.3, 1.0),
    ],
)
def test_accuracies_are_those_of_an_independent_fit(
    num_classes, items, noise, strength
):
    labels = np.tile(np.arange(num_classes), items)
    train, test = (clusters(labels, seed, noise) for seed in (1, 2))
    found = linear_probe(train, labels, test, labels, regularization=strength)
    scores = reference_scores(train, labels, test, strength)
    assert ("top_5" in found) == (num_classes > 5)
    chance = 1 / num_classes
    assert max(0.3, chance) < found["top_1"] < found.get("top_5", 0.99) < 1
    for name, accuracy in classification_accuracy(scores, labels).items():
        assert found[name] == pytest.approx(accuracy, abs=1e-9)


def test_classes_may_be_missing_in_the_test_data():
    kept = np.isin(TEST, [1, 2, 5])
    test = {"test_features": FEATURES[2][kept], "test_labels": NAMES[TEST[kept]]}
    found = probe(regularization=1.0, **test)
    assert found["top_1"] == pytest.approx(found["mean_per_class"])


# === The choice of the strength ===


def test_the_choice_is_made_by_scores_on_the_validation_data(searched):
    tried = searched["validation"]
    np.testing.assert_allclose(list(tried), np.logspace(6, -6, 96))
    for strength, score in [*tried.items()][::4]:
        if 1e-2 <= strength <= 1e2:
            scores = reference_scores(FEATURES[0], TRAIN, FEATURES[1], strength)
            expected = np.mean(scores.argmax(axis=1) == VALIDATION)
            assert score == pytest.approx(expected, abs=1e-9)
    # Of equal scores, the strongest regularization is taken.
    best = [x for x, score in tried.items() if score == max(tried.values())]
    assert len(best) > 1
    assert searched["regularization"] == max(best)


def test_the_choice_never_looks_at_test_data(searched):
    rng = np.random.default_rng(5)
    labels = NAMES[rng.integers(0, 7, 20)]
    other = probe(test_features=rng.normal(size=(20, 12)), test_labels=labels)
    for name in ("regularization", "validation"):
        assert searched[name] == other[name]
    assert searched["top_1"] != other["top_1"]


def test_the_metric_of_the_validation_data_decides():
    train = np.repeat(np.arange(4), [90, 20, 6, 4])
    features = clusters(train, 1)
    found = {
        metric: linear_probe(features, train, features, train, metric=metric)
        for metric in ("top_1", "mean_per_class")
    }
    # With the strongest regularization all items are of the largest class.
    assert found["top_1"]["validation"][1e6] == pytest.approx(18 / 24)
    assert found["mean_per_class"]["validation"][1e6] == 0.25


def test_a_strength_that_is_given_is_not_searched_for(searched):
    strength = searched["regularization"]
    expected = {**searched, "validation": {}}
    assert probe(regularization=strength) == expected
    # The final fit is on the training and the validation data.
    found = probe(
        train_features=np.concatenate(FEATURES[:2]),
        train_labels=NAMES[np.concatenate([TRAIN, VALIDATION])],
        validation=None,
        regularization=strength,
    )
    assert found == expected


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_the_seed_decides_the_split():
    options = {"validation": None, "max_iterations": 20}
    found = [probe(seed=seed, **options)["validation"] for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_two_items_of_each_class_are_enough_to_choose_on():
    labels = np.tile(np.arange(10), 2)
    options = {"max_iterations": 20, "validation_split": 0.99}
    found = linear_probe(*[clusters(labels, 1), labels] * 2, **options)
    # Each of the ten items that are held out has another class.
    counts = 10 * np.array([*found["validation"].values()])
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    with pytest.raises(ValueError, match=r"`train_labels` must .*Received: .* class 0"):
        linear_probe(*[clusters(labels[1:], 1), labels[1:]] * 2)


@pytest.mark.parametrize("part", [0.01, 0.2, 0.8])
def test_rare_classes_are_in_both_parts(part):
    labels = np.repeat([0, 1, 2], [100, 3, 2])
    features = clusters(labels, 1, noise=0.1)
    options = {"metric": "mean_per_class", "validation_split": part}
    found = linear_probe(*[features, labels] * 2, **options)
    # The rare classes raise the metric once the regularization is weak enough.
    scores = found["validation"].values()
    assert (min(scores), max(scores)) == (pytest.approx(1 / 3), 1.0)
    assert found["mean_per_class"] == 1.0


# === Of a model ===


def test_a_model_is_probed_by_its_embeddings(model):
    data, given = {}, {}
    labels = np.arange(32) % 4 * 10
    for seed, part in enumerate(("train", "validation", "test")):
        images = class_pairs(32, 4)["images"].astype("int32")
        noise = np.random.default_rng(seed).integers(-60, 61, size=images.shape)
        images = np.clip(images + noise, 0, 255).astype("uint8")
        data[part] = images, labels
        given[part] = embed(model, images, verbose=0)["image_embeddings"], labels
    expected = linear_probe(*given["train"], *given["test"], given["validation"])
    assert expected["top_1"] > 0.5
    images, _ = data["train"]
    data["train"] = iter(split({"images": images, "labels": labels}, 10))
    assert evaluate_linear_probe(model.backbone, **data, verbose=0) == expected


# === Bad input ===


def with_nan(features):
    features = features.copy()
    features[[4, 9]] = np.nan
    return features


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train_features", {"train_features": with_nan(FEATURES[0])}),
        ("train_labels", {"train_labels": np.eye(7)[TRAIN]}),
        ("test_labels", {"test_labels": TEST / 2}),
        ("test_labels", {"test_labels": TEST}),
        ("validation_labels", {"validation": (FEATURES[1], VALIDATION)}),
        ("regularization", {"regularization": 0}),
        ("regularization", {"regularization": np.inf}),
        ("metric", {"metric": "accuracy"}),
        ("validation_split", {"validation_split": 1.1}),
        ("max_iterations", {"max_iterations": 0}),
        ("train_labels", {"train_labels": np.zeros_like(TRAIN)}),
    ],
)
def test_bad_input_is_refused_by_name(name, options):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: "):
        probe(**options)


def test_errors_come_before_anything_is_embedded(model, monkeypatch):
    images = class_pairs(4)["images"]
    with pytest.raises(ValueError, match=r"`test` must hold 'labels'.*\['images'\]"):
        evaluate_linear_probe(model, (images, np.arange(4)), images, verbose=0)
    with pytest.raises(ValueError, match="`metric`"):
        evaluate_linear_probe(model, None, None, metric="f1")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        evaluate_linear_probe(model, None, None)


def test_features_are_as_wide_as_those_of_training():
    wide = np.zeros((105, 13))
    match = r"`{}_features` must be as wide .*Received: 13 columns instead of 12"
    with pytest.raises(ValueError, match=match.format("test")):
        probe(test_features=wide)
    with pytest.raises(ValueError, match=match.format("validation")):
        probe(validation=(wide, NAMES[TEST]))
