import types
import warnings

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from keras_cluster_mask.evaluation import (
    classification_accuracy,
    embed,
    embed_texts,
    evaluate_zero_shot,
    zero_shot_classifier,
)
from keras_cluster_mask.evaluation.embedding import Embedder
from tests.helpers import random_pairs

NAMES = ["cat", "dog", "fox", "owl", "cow", "bee", "ant"]


def unbalanced_labels(count, num_classes, seed=0):
    shares = np.arange(1, num_classes + 1) ** 2
    shares[-1] = 0
    return np.random.default_rng(seed).choice(
        num_classes, count, p=shares / shares.sum()
    )


@pytest.mark.any_backend
@pytest.mark.parametrize("num_classes", [6, 30])
def test_accuracies_are_those_of_clip_benchmark_and_scikit_learn(num_classes):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    scores = np.random.default_rng(0).normal(size=(500, num_classes)).astype("float32")
    labels = unbalanced_labels(500, num_classes)
    # Columns that are equal, and so tie, for classes that no item is of.
    scores[:, -1] = scores[:, 0] - 9
    found = classification_accuracy(scores, labels)
    top = torch.from_numpy(scores).topk(5)[1].numpy()
    assert found["top_5"] == pytest.approx((top == labels[:, None]).any(1).mean())
    assert found["top_1"] == pytest.approx((top[:, 0] == labels).mean(), abs=1e-9)
    # It warns of answers that are never right.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert found["mean_per_class"] == pytest.approx(expected, abs=1e-9)
    # Its own code makes floats of arrays of one, which newer NumPy does not.
    theirs.float = lambda array: float(np.asarray(array).item())
    try:
        both = theirs.accuracy(
            torch.from_numpy(scores), torch.from_numpy(labels), topk=(1, 5)
        )
    finally:
        del theirs.float
    assert [found["top_1"], found["top_5"]] == pytest.approx(both, abs=1e-6)


@pytest.mark.any_backend
def test_of_equal_scores_the_first_class_counts_as_the_highest():
    scores = np.array([[1, 1, 0, 0], [0, 2, 1, 1], [5, 5, 5, 5]], "float32")
    found = classification_accuracy(scores, [1, 1, 3], ks=(1, 2, 3, 4))
    assert found == {
        "top_1": pytest.approx(1 / 3),
        "top_2": pytest.approx(2 / 3),
        "top_3": pytest.approx(2 / 3),
        "mean_per_class": pytest.approx(1 / 4),
    }
    labels = np.arange(60) % 4
    scores = np.random.default_rng(0).integers(0, 3, (60, 4)).astype("float32")
    found = classification_accuracy(scores, labels, ks=1)
    expected = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert found["mean_per_class"] == pytest.approx(expected)
    assert found["top_1"] == np.mean(scores.argmax(axis=1) == labels)


@pytest.fixture
def clip_benchmark():
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")

    class Adapter:
        """What clip_benchmark asks of a model and its data, of given embeddings."""

        def __init__(self, model, images, names, tokenizer):
            self.embedder, self.given = Embedder(model), images
            self.tokenizer = tokenizer
            self.dataset = types.SimpleNamespace(classes=names)

        def encode_text(self, ids):
            return torch.from_numpy(self.embedder.texts(ids.numpy()))

        def encode_image(self, images):
            found = self.embedder.images(images.numpy().astype("uint8"))
            return torch.from_numpy(found)

        def tokenize(self, texts):
            ids = self.tokenizer([text.encode() for text in texts])
            return torch.tensor(ids)

    def evaluate(model, images, labels, names, tokenizer, templates):
        adapter = Adapter(model, images, names, tokenizer)
        classifier = metrics.zero_shot_classifier(
            adapter, adapter.tokenize, names, templates, "cpu", amp=False
        )
        batches = [(torch.from_numpy(images), torch.from_numpy(labels))]
        logits, target = metrics.run_classification(
            adapter, classifier, batches, "cpu", amp=False
        )
        # `topk` leaves open which of equal scores it takes; `argmax` the first. Equal
        # columns may give scores that differ by rounding.
        logits = logits.numpy().round(3)
        order = np.argsort(-logits, axis=1, kind="stable")
        hits = order == target.numpy()[:, None]
        return {
            "top_1": hits[:, :1].any(axis=1).mean(),
            "top_5": hits[:, :5].any(axis=1).mean(),
            "mean_per_class": balanced_accuracy_score(target, logits.argmax(axis=1)),
        }

    return evaluate


def test_classes_of_the_same_name_count_as_in_clip_benchmark(
    model, tokenizer, clip_benchmark
):
    names = ["crane", "dog", "fox", "crane", "owl", "bee", "dog"]
    images = random_pairs(60, seed=3)["images"]
    # An untrained model prefers few classes, so these are the classes of the images.
    texts = embed_texts(model, names, tokenizer, verbose=0)
    scores = embed(model, images, verbose=0)["image_embeddings"] @ texts.T
    order = np.argsort(-scores, axis=1, kind="stable")
    labels = order[np.arange(60), np.random.default_rng(0).integers(0, 4, 60)]
    templates = ["a photo of a {c}.", "{c}"]
    with pytest.warns(UserWarning, match=r"`class_names` holds \['crane', 'dog'\]"):
        found = evaluate_zero_shot(
            model, (images, labels), names, tokenizer, templates, verbose=0
        )
    expected = clip_benchmark(model, images, labels, names, tokenizer, templates)
    assert found == pytest.approx(expected, abs=1e-9)
    both = np.isin(labels, [0, 3]) | np.isin(labels, [1, 6])
    assert both.any()
    assert found["top_1"] > 0


def test_classes_of_the_same_name_have_equal_weights(model, tokenizer):
    names = [f"{word} {i}" for i in range(100) for word in ("a", "b")]
    names += names[:50]
    with pytest.warns(UserWarning, match="more than once"):
        classifier = zero_shot_classifier(model, names, tokenizer, verbose=0)
    np.testing.assert_array_equal(classifier[:, :50], classifier[:, 200:])


def test_templates_may_be_functions_of_the_name(model, tokenizer):
    functions = (
        lambda name: f"a photo of a {name}.",
        lambda name: f"{name.upper()}!",
        "the {}",
    )
    found = zero_shot_classifier(model, NAMES, tokenizer, functions, verbose=0)
    texts = {n: [f"a photo of a {n}.", f"{n.upper()}!", f"the {n}"] for n in NAMES}
    expected = zero_shot_classifier(model, NAMES, tokenizer, texts, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    alone = zero_shot_classifier(model, NAMES, tokenizer, functions[0], verbose=0)
    expected = zero_shot_classifier(model, NAMES, tokenizer, verbose=0)
    np.testing.assert_allclose(alone, expected, atol=1e-6)


@pytest.mark.any_backend
def test_open_clips_templates_are_taken(model, tokenizer):
    open_clip = pytest.importorskip("open_clip")
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    assert callable(templates[0])
    found = zero_shot_classifier(model, NAMES, tokenizer, templates, verbose=0)
    assert found.shape == (96, len(NAMES))


@pytest.mark.any_backend
def test_a_mapping_of_any_type_holds_the_texts_of_each_class(model, tokenizer):
    texts = {"cat": ["a cat"], "dog": ["a dog", "it barks"]}
    found, expected = (
        zero_shot_classifier(model, ["cat", "dog"], tokenizer, each, verbose=0)
        for each in (types.MappingProxyType(texts), texts)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.any_backend
def test_a_dictionary_may_hold_the_same_texts_for_two_classes(model, tokenizer):
    texts = {"cat": ["a pet"], "dog": "a pet"}
    found = zero_shot_classifier(model, ["cat", "dog"], tokenizer, texts, verbose=0)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])


@pytest.mark.any_backend
def test_scores_of_any_scale_give_the_same_accuracies():
    rng = np.random.default_rng(0)
    cosines = rng.uniform(0, 0.5, (300, 40))
    labels = cosines.argsort(axis=1)[:, -3]
    logits = 100 * cosines
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    for scores in (cosines, logits, shares):
        found = classification_accuracy(scores, labels)
        assert found == {"top_1": 0.0, "top_5": 1.0, "mean_per_class": 0.0}


@pytest.mark.any_backend
def test_the_mean_per_class_is_over_classes_that_occur():
    scores = np.eye(4, dtype="float32")[[0, 0, 0, 1]]
    found = classification_accuracy(scores, [0, 0, 1, 1], ks=(1,))
    assert found == {"top_1": 0.75, "mean_per_class": 0.75}


def test_embeddings_of_templates_are_averaged(model, tokenizer):
    templates = ["{}", "the {c}!", "x{}"]
    classifier = zero_shot_classifier(model, NAMES, tokenizer, templates, verbose=0)
    assert classifier.shape == (96, len(NAMES))
    for index, name in enumerate(NAMES):
        texts = [name, f"the {name}!", f"x{name}"]
        mean = embed_texts(model, texts, tokenizer, verbose=0).mean(axis=0)
        expected = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(classifier[:, index], expected, atol=1e-6)


def test_each_class_may_have_texts_of_its_own(model, tokenizer):
    templates = {"cat": ["it purrs", "a cat"], "dog": "it barks"}
    found = zero_shot_classifier(model, ["dog", "cat"], tokenizer, templates, verbose=0)
    barks = embed_texts(model, ["it barks"], tokenizer, verbose=0)[0]
    np.testing.assert_allclose(found[:, 0], barks, atol=1e-6)


def test_a_data_set_is_classified_batch_by_batch(model, tokenizer, monkeypatch):
    monkeypatch.setattr("keras_cluster_mask.evaluation.classification.BLOCK", 7)
    images = random_pairs(30)["images"]
    labels = unbalanced_labels(30, len(NAMES))
    batches = [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 30, 8)]
    found = evaluate_zero_shot(model, batches, NAMES, tokenizer, "{}", verbose=0)
    texts = embed_texts(model, NAMES, tokenizer, verbose=0)
    scores = embed(model, images, verbose=0)["image_embeddings"] @ texts.T
    assert found == pytest.approx(classification_accuracy(scores, labels))
    assert sorted(found) == ["mean_per_class", "top_1", "top_5"]


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((2, 3)), [0, 3], r"0 to 2.*1 rows.*\[1\]: \[3\]"),
        (np.zeros((2, 3)), [0, -1], r"\[1\]: \[-1\]"),
        (np.zeros((2, 3)), [0.0, 1.0], "type float64"),
        (np.zeros((2, 3)), [0], r"shape \(1,\)"),
        (np.array([[0, np.nan], [0, 0]]), [0, 0], r"1 rows.*\[0\]"),
    ],
)
def test_bad_scores_and_labels_are_errors(scores, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        classification_accuracy(scores, labels)
    assert "Received: " in str(error.value)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["cat", " ", None], "{}", r"`class_names`.*no name for class \[1, 2\]"),
        ([], "{}", r"`class_names`.*Received: \[\]"),
        ("cat", "{}", r"`class_names`.*Received: 'cat'"),
        (["cat"], [], r"`templates`.*Received: templates=\[\]"),
        (["cat"], "a photo", "`templates`.*Received: templates=.'a photo'"),
        (["cat"], "{} {}", "`templates`"),
        (["cat", "dog"], {"cat": ["x"]}, r"`templates`.*Received: \[\] for 'dog'"),
        (["cat"], [lambda name: None], r"`templates`.*Received: \[None\] for 'cat'"),
        (["cat"], {"cat": [lambda name: name]}, r"`templates`.*Received: .*'cat'"),
        (["cat", "dog"], lambda name: "a photo", r"`templates`.*differ.*'a photo'"),
        (["cat"], None, r"`templates`.*Received: templates=\[None\]"),
        (["cat"], ["{}", 3], r"`templates`.*Received: templates=\['{}', 3\]"),
    ],
)
def test_bad_names_and_templates_are_errors(
    model, tokenizer, names, templates, message
):
    with pytest.raises(ValueError, match=message):
        zero_shot_classifier(model, names, tokenizer, templates)


@pytest.mark.any_backend
def test_classes_of_the_same_name_are_told_of(model, tokenizer):
    with pytest.warns(UserWarning, match=r"`class_names` holds \['cat'\]"):
        zero_shot_classifier(model, ["cat", "dog", "cat"], tokenizer, verbose=0)


def test_what_else_is_in_the_data_plays_no_part(model, tokenizer):
    pairs = {**random_pairs(4), "labels": [0, 1, 2, 3]}
    alone = {name: pairs[name] for name in ("images", "labels")}
    pairs["token_ids"] = pairs["token_ids"] + 10**6
    found = [
        evaluate_zero_shot(model, data, NAMES, tokenizer, verbose=0)
        for data in (pairs, alone)
    ]
    assert found[0] == found[1]


@pytest.mark.any_backend
def test_data_is_checked_as_it_is_read(model, tokenizer):
    read = []

    def batches():
        for index in range(5):
            read.append(index)
            yield random_pairs(2)["images"]

    with pytest.raises(ValueError, match="'labels'"):
        evaluate_zero_shot(model, batches(), iter(NAMES), tokenizer, verbose=0)
    assert read == [0]


@pytest.mark.any_backend
def test_data_without_labels_or_with_foreign_ones_is_an_error(model, tokenizer):
    images = random_pairs(3)["images"]
    with pytest.raises(ValueError, match=r"'labels'.*Received: "):
        evaluate_zero_shot(model, images, NAMES, tokenizer, verbose=0)
    with pytest.raises(ValueError, match=r"0 to 6.*\[2\]: \[7\]"):
        evaluate_zero_shot(model, (images, [0, 1, 7]), NAMES, tokenizer, verbose=0)
