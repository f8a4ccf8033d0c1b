import types

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from keras_cluster_mask.callbacks import ZeroShot
from keras_cluster_mask.data import image_text_dataset
from keras_cluster_mask.evaluation import (
    classification_accuracy,
    embed,
    embed_texts,
    evaluate_zero_shot,
    zero_shot_classifier,
)
from keras_cluster_mask.evaluation.inputs import class_names_of
from tests.helpers import random_pairs, split

pytestmark = pytest.mark.any_backend

COLORS = ["red", "green", "blue"]
NAMES = ["cat", "dog", "fox", "owl", "cow", "bee", "ant"]


def unbalanced_labels(count, num_classes, seed=0):
    shares = np.arange(1, num_classes + 1) ** 2
    shares[-1] = 0
    return np.random.default_rng(seed).choice(
        num_classes, count, p=shares / shares.sum()
    )


def scores_of(model, images, texts, tokenizer):
    texts = embed_texts(model, texts, tokenizer, verbose=0)
    return embed(model, images, verbose=0)["image_embeddings"] @ texts.T


# It warns of answers that are never right.
@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("num_classes", [6, 30])
def test_accuracies_are_those_of_scikit_learn(num_classes):
    scores = np.random.default_rng(0).normal(size=(500, num_classes)).astype("float32")
    labels = unbalanced_labels(500, num_classes)
    # Columns that are equal, and so tie, for classes that no item is of.
    scores[:, -1] = scores[:, 0] - 9
    classes = np.arange(num_classes)
    assert classification_accuracy(scores, labels) == pytest.approx(
        {
            "top_1": top_k_accuracy_score(labels, scores, k=1, labels=classes),
            "top_5": top_k_accuracy_score(labels, scores, k=5, labels=classes),
            "mean_per_class": balanced_accuracy_score(labels, scores.argmax(axis=1)),
        },
        abs=1e-9,
    )


def test_scores_are_compared_in_their_own_precision():
    scores = np.array([[1 - 1e-10, 1 - 1e-12]])
    assert classification_accuracy(scores, [1], ks=1)["top_1"] == 1.0


def test_of_equal_scores_the_first_class_counts_as_the_highest():
    scores = np.array([[1, 1, 0, 0], [0, 2, 1, 1], [5, 5, 5, 5]], "float32")
    found = classification_accuracy(scores, [1, 1, 3], ks=(1, 2, 3, 4))
    expected = {"top_1": 1 / 3, "top_2": 2 / 3, "top_3": 2 / 3, "mean_per_class": 1 / 4}
    assert found == pytest.approx(expected)


def test_of_classes_of_the_same_name_only_the_first_is_predicted(model, tokenizer):
    names = ["crane", "dog", "fox", "crane", "owl", "bee", "dog"]
    images = random_pairs(60, seed=3)["images"]
    scores = scores_of(model, images, names, tokenizer)
    scores = scores[:, [names.index(name) for name in names]]
    # Half of the images are of the class that is predicted, the others of the second
    # crane.
    labels = np.where(np.arange(60) % 2, 3, scores.argmax(axis=1))
    with pytest.warns(UserWarning, match=r"`class_names` contains \['crane', 'dog'\]"):
        found = evaluate_zero_shot(
            model, (images, labels), names, tokenizer, "{}", verbose=0
        )
    assert found["top_1"] == 0.5
    assert found == pytest.approx(classification_accuracy(scores, labels))


def test_embeddings_of_templates_are_averaged(model, tokenizer):
    templates = ["{}", "the {c}!", "x{}"]
    classifier = zero_shot_classifier(model, NAMES, tokenizer, templates, verbose=0)
    assert classifier.shape == (96, len(NAMES))
    for index, name in enumerate(NAMES):
        texts = [name, f"the {name}!", f"x{name}"]
        mean = embed_texts(model, texts, tokenizer, verbose=0).mean(axis=0)
        expected = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(classifier[:, index], expected, atol=1e-6)


def test_images_and_labels_are_read_batch_by_batch_and_nothing_else(model, tokenizer):
    labels = unbalanced_labels(30, len(NAMES))
    pairs = {**random_pairs(30), "labels": labels}
    pairs["token_ids"] += 10**6
    batches = split(pairs, 8)
    found = evaluate_zero_shot(model, batches, NAMES, tokenizer, "{}", verbose=0)
    scores = scores_of(model, pairs["images"], NAMES, tokenizer)
    assert found == pytest.approx(classification_accuracy(scores, labels))
    assert sorted(found) == ["mean_per_class", "top_1", "top_5"]


def test_templates_are_formats_functions_or_texts_of_each_class(model, tokenizer):
    texts = {name: [f"a photo of a {name}.", f"{name}!"] for name in NAMES}
    expected = zero_shot_classifier(model, NAMES, tokenizer, texts, verbose=0)
    for templates in (
        ["a photo of a {}.", "{c}!"],
        iter(("a photo of a {}.", lambda name: f"{name}!")),
        types.MappingProxyType(texts),
    ):
        found = zero_shot_classifier(model, NAMES, tokenizer, templates, verbose=0)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    # One text, and the same one for two classes.
    alike = {"cat": ["a pet"], "dog": "a pet"}
    found = zero_shot_classifier(model, ["cat", "dog"], tokenizer, alike, verbose=0)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])


# === Bad input ===


@pytest.mark.parametrize(
    ("name", "labels", "score"),
    [("labels", [0, -1], 0.0), ("labels", [0.0, 1.0], 0.0), ("scores", [0, 0], np.nan)],
)
def test_bad_scores_and_labels_are_refused_by_name(name, labels, score):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: "):
        classification_accuracy(np.full((2, 3), score), labels)


@pytest.mark.parametrize(
    ("argument", "names", "templates"),
    [
        ("class_names", ["cat", " ", None], "{}"),
        ("class_names", "cat", "{}"),
        ("templates", ["cat"], []),
        ("templates", ["cat"], "a photo"),
        ("templates", ["cat"], "{} {}"),
        ("templates", ["cat"], {"cat": 5}),
        ("templates", ["cat"], [lambda name: None]),
    ],
)
def test_bad_names_and_templates_are_refused_by_name(
    model, tokenizer, argument, names, templates
):
    with pytest.raises(ValueError, match=rf"`{argument}`.*Received: "):
        zero_shot_classifier(model, names, tokenizer, templates)


def test_bad_data_is_refused_at_its_first_batch(model, tokenizer):
    images = random_pairs(3)["images"]
    for batch in (images, (images, [0, 1, 7])):
        batches = iter([batch, None])
        with pytest.raises(ValueError, match=r"labels.*Received: "):
            evaluate_zero_shot(model, batches, NAMES, tokenizer, verbose=0)
        assert next(batches) is None


@pytest.fixture
def folder(tmp_path):
    """A folder of images, with a folder in it for each color."""
    for name in COLORS:
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), name).save(tmp_path / name / "0.png")
    return tmp_path


def colored(folder, class_names):
    options = dict(label_key="folder", class_names=class_names, max_skipped=1.0)
    return image_text_dataset(folder, None, 16, 2, False, **options)


@pytest.mark.filterwarnings("ignore:.*was skipped")
def test_a_misspelled_class_is_not_left_out(model, tokenizer, folder):
    misspelled = ["red", "gren", "blue"]
    data = colored(folder, misspelled)
    with pytest.raises(ValueError, match=r"`class_names` of.*Received: \['gren'\]"):
        evaluate_zero_shot(model, data, misspelled, tokenizer, verbose=0)
    # A choice of the classes, and names without images.
    for names in (["red", "blue"], [*COLORS, "black"]):
        evaluate_zero_shot(model, colored(folder, names), names, tokenizer, verbose=0)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (["green", "blue", "red"], "3 classes of .* for 3, .* in the order$"),
        (["red", "green"], "3 classes of .* for 2, .* in \\['blue'\\]$"),
    ],
)
def test_classes_are_the_same_everywhere(model, tokenizer, folder, other, differs):
    data = colored(folder, COLORS)
    for evaluate in (
        lambda: evaluate_zero_shot(model, data, other, tokenizer),
        lambda: ZeroShot(data, other, tokenizer),
    ):
        with pytest.raises(ValueError, match=rf"`class_names` must.*{differs}"):
            evaluate()


def test_classes_may_have_other_letters_and_more_may_follow(model, tokenizer, folder):
    more = [name.upper() for name in COLORS] + ["black"]
    evaluate_zero_shot(model, colored(folder, COLORS), more, tokenizer, verbose=0)


def test_a_class_without_images_does_not_shift_the_others(model, tokenizer, folder):
    names = ["azul", "verde", "rojo"]
    (folder / "green" / "0.png").unlink()
    data = colored(folder, None)
    with pytest.raises(ValueError, match="Received: 2 classes of `data` for 3"):
        evaluate_zero_shot(model, data, names, tokenizer, verbose=0)
    # The remedy; as many other names are fine.
    data = colored(folder, sorted(COLORS))
    evaluate_zero_shot(model, data, names, tokenizer, verbose=0)


def test_the_class_names_of_other_data_have_no_meaning_here():
    # As `keras.utils.image_dataset_from_directory` sets them.
    named = types.SimpleNamespace(class_names=["cat"])
    assert class_names_of(named) == []
