"""Images with labels, with all their captions, and alone, as evaluation needs them."""

import functools

import numpy as np
import pytest

from keras_cluster_mask.data.samples import Fault, Fields
from tests.data.reading import make_dataset

pytestmark = pytest.mark.any_backend


make = functools.partial(make_dataset, tokenizer=None, batch_size=4, include_keys=False)


def label_of(sample, label_key, class_names=None):
    """The label of a sample, or what is wrong with it."""
    fields = Fields([], None, False, label_key, class_names)
    found = fields.sample({"__key__": "a", **sample})
    return found.reason if isinstance(found, Fault) else found.label


def values(dataset, name):
    return [value for batch in dataset for value in batch[name].tolist()]


@pytest.mark.parametrize(
    "options",
    [
        {"label_key": "cls"},
        {"label_key": ["missing", "json.label"]},
        {"label_key": "json.name", "class_names": ["cat", "dog", "fox"]},
        {"label_key": "json.label", "class_names": ["cat", "dog", "fox"]},
    ],
)
def test_labels_are_numbers_of_classes(options):
    sample = {"cls": b"1\n", "json": b'{"label": 1, "name": "dog"}'}
    assert label_of(sample, **options) == 1


@pytest.mark.parametrize(
    "label",
    [
        *(b"9" * 5000, "9" * 5000, 10**5000, -(10**5000), str(2**31), 2**31, -1, "-1"),
        *(1e300, float("inf"), float("-inf"), float("nan")),
        *("\u00b2", "1.5", "inf", "nan", b"\xff"),
        *(True, {"a": 1}, ["1", "2"], [[1]]),
    ],
    # Nor does Python print a number of so many digits.
    ids=lambda label: "int" if isinstance(label, int) else repr(label)[:12],
)
def test_odd_labels_are_unknown_labels(label):
    assert label_of({"cls": label}, "cls") == "unknown label"
    assert label_of({"cls": label}, "cls", ["a", "b"]) == "unknown label"
    # A folder of the number of a class is another class.
    assert label_of({"folder": "1"}, "folder", ["a", "b"]) == "unknown label"


@pytest.mark.parametrize("content", [b"null", b"9" * 5000])
def test_json_without_a_label_has_none(content):
    """Python converts no number of five thousand digits."""
    sample = {"json": b'{"label": %s}' % content}
    assert label_of(sample, "json.label") == "no label"


@pytest.mark.parametrize("label", [0, 7, 2**31 - 1])
def test_usual_labels_are_numbers(label):
    numbers = [label, float(label), np.int64(label), np.float64(label)]
    for value in (*numbers, str(label), f" {label}\n".encode(), [label], f"{label}.0"):
        assert label_of({"cls": value}, "cls") == label


def test_numbers_in_text_are_the_numbers_of_classes_unless_they_are_names():
    names = ["a", "1", "b"]
    for label, number in (("1", 1), (2, 2), ("0", 0), ("1.0", 1), (1.0, 1), ("b", 2)):
        assert label_of({"cls": label}, "cls", names) == number
    assert label_of({"cls": "3"}, "cls", names) == "unknown label"


@pytest.mark.parametrize(
    ("folders", "names", "expected"),
    [
        ({"cats": 1, "dogs/small": 2, "ants": 1}, None, [0, 1, 2, 2]),
        ({"10": 1, "2": 2}, None, [10, 2, 2]),
        ({"cat": 2, "dog": 1, "fish": 1}, ["fish", "cat", "dog"], [1, 1, 2, 0]),
        ({"1": 1, "cat ": 2}, None, [0, 1, 1]),
        ({"2019": 1, "2020": 2}, ["2019", "2020"], [0, 1, 1]),
    ],
)
def test_folders_are_classes_in_the_order_of_their_names_or_of_those_given(
    tmp_path, encode, folders, names, expected
):
    for folder, count in folders.items():
        (tmp_path / "images" / folder).mkdir(parents=True)
        for n in range(count):
            path = tmp_path / "images" / folder / f"{n}.png"
            path.write_bytes(encode(np.zeros((8, 8, 3), "uint8")))
    options = {"label_key": "folder"}
    dataset = make(tmp_path / "images", class_names=names, **options)
    assert values(dataset, "labels") == expected
    if dataset.class_names:
        again = make(tmp_path / "images", class_names=dataset.class_names, **options)
        assert values(again, "labels") == expected
