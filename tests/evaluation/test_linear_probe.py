import warnings

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

import keras_cluster_mask as kcm
from keras_cluster_mask.evaluation import embed, evaluate_linear_probe, linear_probe
from keras_cluster_mask.evaluation.linear_probe import STRENGTHS, _split, search
from tests.helpers import class_pairs


def clusters(labels, seed=0, noise=2.0):
    """Features of length 1 around a center for each class."""
    centers = np.random.default_rng(0).normal(size=(labels.max() + 1, 12))
    noise = noise * np.random.default_rng(seed).normal(size=(len(labels), 12))
    features = centers[labels] + noise
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype("float32")


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
        "verbose": 0,
    }
    return linear_probe(**{**given, **options})


@pytest.fixture
def fits(monkeypatch):
    """What scikit-learn is given to fit."""
    given = []
    fit = LogisticRegression.fit

    def recorded(self, features, labels):
        given.append((self.C, features, labels))
        return fit(self, features, labels)

    monkeypatch.setattr(LogisticRegression, "fit", recorded)
    return given


# === Accuracies ===


@pytest.mark.any_backend
def test_accuracies_equal_scikit_learns_and_clip_benchmarks(monkeypatch):
    found = probe()
    classifier = LogisticRegression(C=1 / found["regularization"], max_iter=1000)
    classifier.fit(
        np.concatenate(FEATURES[:2]), NAMES[np.concatenate([TRAIN, VALIDATION])]
    )
    scores = classifier.decision_function(FEATURES[2])
    predicted = classifier.predict(FEATURES[2])
    assert 0.3 < found["top_1"] < found["top_5"] < 1
    assert found["top_1"] == pytest.approx(np.mean(predicted == NAMES[TEST]))
    top_5 = top_k_accuracy_score(NAMES[TEST], scores, k=5, labels=classifier.classes_)
    assert found["top_5"] == pytest.approx(top_5)
    balanced = balanced_accuracy_score(NAMES[TEST], predicted)
    assert found["mean_per_class"] == pytest.approx(balanced)

    # It takes an array of one element for a number, which NumPy refuses.
    monkeypatch.setattr(
        zeroshot_classification, "float", lambda x: x.item(), raising=False
    )
    labels = np.searchsorted(classifier.classes_, NAMES[TEST])
    theirs = zeroshot_classification.accuracy(
        torch.tensor(scores), torch.tensor(labels), topk=(1, 5)
    )
    assert [found["top_1"], found["top_5"]] == pytest.approx(theirs, abs=1e-6)


@pytest.mark.any_backend
def test_two_classes_are_classified_as_by_scikit_learn():
    train, test = np.arange(40) % 2, np.arange(30) % 2
    features = clusters(train, 1, noise=3), clusters(test, 2, noise=3)
    found = linear_probe(
        features[0], train, features[1], test, regularization=0.5, verbose=0
    )
    classifier = LogisticRegression(C=2).fit(features[0], train)
    assert found["top_1"] == pytest.approx(classifier.score(features[1], test))
    assert 0.5 < found["top_1"] < 1
    assert "top_5" not in found


@pytest.mark.any_backend
def test_top_5_needs_more_than_five_classes():
    for num_classes in (5, 6):
        labels = np.arange(30) % num_classes
        features = clusters(labels)
        found = linear_probe(
            features, labels, features, labels, regularization=1.0, verbose=0
        )
        assert ("top_5" in found) == (num_classes == 6)


@pytest.mark.any_backend
def test_classes_may_be_missing_in_the_test_data():
    kept = np.isin(TEST, [1, 2, 5])
    found = probe(test_features=FEATURES[2][kept], test_labels=NAMES[TEST[kept]])
    whole = probe()
    assert found["regularization"] == whole["regularization"]
    assert found["top_1"] == pytest.approx(found["mean_per_class"])


# === Unbalanced classes ===


@pytest.mark.any_backend
def test_the_mean_per_class_of_unbalanced_classes_is_scikit_learns():
    train = np.repeat(np.arange(4), [90, 20, 6, 4])
    test = np.repeat(np.arange(4), [60, 10, 5, 5])
    features = clusters(train, 1, noise=2), clusters(test, 2, noise=2)
    found = {
        metric: linear_probe(
            features[0], train, features[1], test, metric=metric, verbose=0
        )
        for metric in ("top_1", "mean_per_class")
    }
    for result in found.values():
        classifier = LogisticRegression(C=1 / result["regularization"], max_iter=1000)
        predicted = classifier.fit(features[0], train).predict(features[1])
        balanced = balanced_accuracy_score(test, predicted)
        assert result["mean_per_class"] == pytest.approx(balanced)
        assert result["top_1"] == pytest.approx(np.mean(predicted == test))
    # The metric on the validation data decides.
    assert found["top_1"]["validation"] != found["mean_per_class"]["validation"]
    strong = max(STRENGTHS)
    assert found["top_1"]["validation"][strong] == pytest.approx(18 / 24, abs=0.05)
    assert found["mean_per_class"]["validation"][strong] == 0.25


@pytest.mark.any_backend
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_the_validation_split_is_stratified_and_leaves_each_class_in_training(
    share, seed
):
    sizes = np.array([50, 10, 9, 3, 2, 2, 1])
    labels = np.repeat(np.arange(7), sizes)
    rest, part = _split(np.arange(77)[:, None], labels, share, seed)
    rows = [each[0][:, 0] for each in (rest, part)]
    assert sorted([*rows[0], *rows[1]]) == list(range(77))
    for each, (_, of) in zip(rows, (rest, part)):
        np.testing.assert_array_equal(of, labels[each])
    # Singletons stay in training, and there are at least as many items as classes.
    size = max(round(share * 76), 6)
    counts = np.bincount(part[1], minlength=7)
    assert counts.sum() == size
    assert (counts < sizes).all()
    assert np.abs(counts - size / 76 * np.where(sizes > 1, sizes, 0)).max() < 1


@pytest.mark.any_backend
def test_a_few_items_of_each_class_are_enough_for_a_validation_split():
    labels = np.arange(28) % 7
    rest, part = _split(labels[:, None], labels, 0.2, seed=0)
    assert np.bincount(part[1]).tolist() == [1] * 7
    assert np.bincount(rest[1]).tolist() == [3] * 7


@pytest.mark.any_backend
def test_the_seed_decides_what_is_split_off():
    labels = np.arange(50) % 5
    found = [_split(np.arange(50)[:, None], labels, 0.3, seed) for seed in (1, 1, 2)]
    rows = [set(part[0][:, 0]) for _, part in found]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.any_backend
def test_the_final_fit_is_on_all_training_data(fits):
    labels = np.arange(70) % 7
    features = clusters(labels, noise=0.2)
    linear_probe(features, labels, features, labels, verbose=0)
    assert len(fits[0][1]) == 56
    np.testing.assert_array_equal(fits[-1][1], features)


# === The choice of the strength ===


@pytest.mark.any_backend
def test_the_validation_scores_are_those_of_scikit_learn():
    found = probe()
    assert len(found["validation"]) > 10
    for strength, score in found["validation"].items():
        classifier = LogisticRegression(C=1 / strength, max_iter=1000)
        classifier.fit(FEATURES[0], NAMES[TRAIN])
        expected = classifier.score(FEATURES[1], NAMES[VALIDATION])
        assert score == pytest.approx(expected, abs=1e-9)
    best = max(found["validation"].values())
    assert found["regularization"] == max(
        strength for strength, score in found["validation"].items() if score == best
    )


@pytest.mark.any_backend
@pytest.mark.parametrize("peak", [-6, -5.875, -4.5, -1, 0.375, 2, 6])
def test_the_search_finds_a_peak_to_an_eighth_of_a_decade(peak):
    strength, tried = search(lambda strength: -abs(np.log10(strength) - peak))
    assert np.log10(strength) == pytest.approx(peak)
    assert len(tried) <= 15
    for exponent in (-6, -4, -2, 0, 2, 4, 6):
        assert 10.0**exponent in tried


@pytest.mark.any_backend
def test_of_equal_scores_the_strongest_regularization_is_taken():
    strength, _ = search(lambda strength: float(strength <= 10.0**1.5))
    assert np.log10(strength) == pytest.approx(1.5)


@pytest.mark.any_backend
def test_the_choice_never_looks_at_test_data():
    found = probe(validation=None)
    rng = np.random.default_rng(5)
    other = probe(
        validation=None,
        test_features=rng.normal(size=(20, 12)),
        test_labels=NAMES[rng.integers(0, 7, 20)],
    )
    for name in ("regularization", "validation", "unconverged"):
        assert found[name] == other[name]
    assert found["top_1"] != other["top_1"]


@pytest.mark.any_backend
def test_the_choice_is_made_on_the_validation_data():
    labels = np.random.default_rng(0).permutation(NAMES[VALIDATION])
    shuffled = probe(validation=(FEATURES[1], labels))
    assert shuffled["validation"] != probe()["validation"]


@pytest.mark.any_backend
def test_the_seed_decides_what_is_split_off_and_equal_seeds_give_equal_results():
    one, again, other = (probe(validation=None, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one["validation"] != other["validation"]


@pytest.mark.any_backend
def test_a_strength_that_is_given_is_not_searched_for(fits):
    found = probe(regularization=0.5)
    assert found["regularization"] == 0.5
    assert found["validation"] == {}
    ((c, features, _),) = fits
    assert c == 2
    # The validation data is trained on too.
    assert len(features) == 210


@pytest.mark.any_backend
def test_fits_that_do_not_converge_are_listed_and_the_last_one_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe()["unconverged"] == []
        found = probe(max_iterations=9)
    # The weaker the regularization, the longer it takes.
    count = len(found["unconverged"])
    assert 1 < count < len(found["validation"])
    assert found["unconverged"] == list(found["validation"])[:count]
    with pytest.warns(UserWarning, match=r"9 iterations.*`max_iterations`") as caught:
        found = probe(max_iterations=9, regularization=1e-6)
    assert len(caught) == 1
    assert found["unconverged"] == [1e-6]


@pytest.mark.any_backend
def test_progress_counts_the_fits(capsys):
    probe()
    assert capsys.readouterr().out == ""
    probe(verbose=1)
    assert "16/16" in capsys.readouterr().out
    probe(verbose=1, regularization=1.0)
    assert "1/1" in capsys.readouterr().out


# === Of a model ===


@pytest.fixture(scope="module")
def data():
    found = {}
    for seed, part in enumerate(("train", "validation", "test")):
        images = class_pairs(32, 4)["images"].astype("int32")
        noise = np.random.default_rng(seed).integers(-60, 61, size=images.shape)
        images = np.clip(images + noise, 0, 255).astype("uint8")
        found[part] = {"images": images, "labels": np.arange(32) % 4 * 10}
    return found


def test_a_model_is_probed_by_its_embeddings(model, data):
    embedded = {part: embed(model, x, verbose=0) for part, x in data.items()}
    items = {part: (x["image_embeddings"], x["labels"]) for part, x in embedded.items()}
    expected = linear_probe(
        *items["train"], *items["test"], items["validation"], verbose=0
    )
    assert evaluate_linear_probe(model, **data, verbose=0) == expected
    assert expected["top_1"] > 0.5
    images, labels = data["train"].values()
    batches = [(images[i : i + 10], labels[i : i + 10]) for i in range(0, 32, 10)]
    found = evaluate_linear_probe(
        model.backbone, iter(batches), data["test"], data["validation"], verbose=0
    )
    assert found == expected


def test_images_in_a_folder_for_each_class_are_data(model, data, tmp_path, encode):
    names = ["ape", "bee", "cow", "dog"]
    for part in ("train", "test"):
        for index, image in enumerate(data[part]["images"]):
            folder = tmp_path / part / names[index % 4]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}.png").write_bytes(encode(image))
    train, test = (
        kcm.data.image_text_dataset(
            tmp_path / part, None, 16, 9, training=False,
            label_key="folder", class_names=names,
        )
        for part in ("train", "test")
    )  # fmt: skip
    found = evaluate_linear_probe(model, train, test, regularization=0.1, verbose=0)
    expected = evaluate_linear_probe(
        model, data["train"], data["test"], regularization=0.1, verbose=0
    )
    assert found["top_1"] == expected["top_1"]


# === Bad input ===


def with_nan(features):
    features = features.copy()
    features[[4, 9]] = np.nan
    return features


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_features": with_nan(FEATURES[0])}, r"`train_features`.*2 rows.*4, 9"),
        ({"test_features": with_nan(FEATURES[2])}, r"`test_features`.*2 rows.*4, 9"),
        ({"train_features": FEATURES[0][0]}, r"`train_features` must have shape"),
        ({"train_labels": NAMES[TRAIN[:-1]]}, r"`train_labels`.*\(140,\).*\(139,\)"),
        ({"train_labels": np.eye(7)[TRAIN]}, r"`train_labels` must be ints"),
        ({"test_labels": TEST / 2}, r"`test_labels` must be ints.*float64"),
        ({"test_labels": TEST}, r"`test_labels`.*5 others.*\[0, 1, 2, 4, 6\]"),
        ({"train_labels": np.full(140, 3)}, "`test_labels`.*6 others"),
        ({"test_features": FEATURES[2][:, :5]}, r"as wide as.*\(105, 5\).*\(140, 12\)"),
        ({"validation": (FEATURES[1], VALIDATION)}, "`validation_labels`.*5 others"),
        ({"validation": FEATURES[1]}, "`validation` must be a pair"),
        ({"regularization": 0}, r"`regularization`.*Received: regularization=0"),
        ({"regularization": np.inf}, "`regularization`.*=inf"),
        ({"metric": "accuracy"}, "`metric`.*top_1.*Received: metric='accuracy'"),
        ({"validation_split": 1.0}, "`validation_split`.*=1.0"),
        ({"max_iterations": 0}, "`max_iterations`.*=0"),
    ],
)
def test_bad_input_is_an_error_that_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        probe(**options)


@pytest.mark.any_backend
def test_one_class_and_single_items_are_errors():
    with pytest.raises(ValueError, match=r"at least two classes.*class 3 alone"):
        probe(train_labels=np.full(140, 3), test_labels=np.full(105, 3))
    features = FEATURES[0][:7]
    with pytest.raises(ValueError, match=r"`validation`.*7 classes of one item"):
        linear_probe(features, range(7), features, range(7), verbose=0)


@pytest.mark.any_backend
def test_bad_data_for_a_model_is_an_error_before_it_is_all_embedded(model, data):
    images = data["test"]["images"]
    with pytest.raises(ValueError, match=r"`test` must hold 'labels'.*\['images'\]"):
        evaluate_linear_probe(model, data["train"], images, verbose=0)
    with pytest.raises(ValueError, match="`metric`"):
        evaluate_linear_probe(model, None, None, metric="f1")
