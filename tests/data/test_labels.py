"""Images with labels, with all their captions, and alone, as evaluation needs them."""

import json

import numpy as np
import pytest

from keras_cluster_mask.data import image_text_dataset
from keras_cluster_mask.data.pairs import Labels

pytestmark = pytest.mark.any_backend


def make(source, tokenizer=None, **options):
    options = {"format": "grain", **options}
    return image_text_dataset(source, tokenizer, 8, 4, training=False, **options)


@pytest.fixture
def labeled(write_tar, encode):
    """Six images, labels 0, 1, 2, 0, 1, 2 in several fields."""
    files = []
    for index in range(6):
        image = encode(np.full((8, 8, 3), index, "uint8"))
        label = index % 3
        entries = {"label": label, "name": ["cat", "dog", "fox"][label]}
        files += [
            (f"{index}.png", image),
            (f"{index}.cls", b"%d\n" % label),
            (f"{index}.json", json.dumps(entries).encode()),
        ]
    return write_tar("labeled.tar", files)


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
def test_labels_are_numbers_of_classes(labeled, options):
    dataset = make(labeled, **options)
    assert [*dataset.element_spec] == ["images", "labels"]
    assert values(dataset, "labels") == [0, 1, 2, 0, 1, 2]
    assert next(iter(dataset))["labels"].dtype == "int32"
    assert [image[0, 0, 0] for b in dataset for image in b["images"]] == [*range(6)]


def test_json_labels_that_are_not_whole_numbers(write_tar, encode):
    image = encode(np.zeros((8, 8, 3), "uint8"))
    files = []
    for index, label in enumerate((1.0, True, 1.5, "2", None)):
        content = json.dumps({"label": label}).encode()
        files += [(f"{index}.png", image), (f"{index}.json", content)]
    shard = write_tar("odd.tar", files)
    dataset = make(shard, label_key="json.label", max_skipped=1.0)
    with pytest.warns(UserWarning, match="unknown label"):
        assert values(dataset, "labels") == [1, 2]
    assert dataset.skipped.by_reason == {"unknown label": 2, "no label": 1}


@pytest.mark.parametrize(
    "label",
    [
        *(b"9" * 5000, "9" * 5000, 10**5000, -(10**5000), str(2**31), 2**31, -1, "-1"),
        *(
            1e300,
            float("inf"),
            float("-inf"),
            float("nan"),
            "\u00b2",
            "1.0",
            "",
            b"\xff",
        ),
        *({}, [], ["1", "2"], [[1]]),
    ],
    # Nor does Python print a number of so many digits.
    ids=lambda label: "int" if isinstance(label, int) else repr(label)[:12],
)
def test_odd_labels_are_unknown_labels(label):
    assert Labels("cls").of({"cls": label})[1] == "unknown label"
    assert Labels("cls", ["a", "b"]).of({"cls": label})[1] == "unknown label"


def test_labels_of_five_thousand_digits_cost_their_samples(write_tar, encode):
    image = encode(np.zeros((8, 8, 3), "uint8"))
    # Python converts no number of so many digits, and JSON may hold one, too.
    contents = {"1.cls": b"3", "2.cls": b"9" * 5000, "3.cls": b"4"}
    contents["4.json"] = b'{"label": %s}' % (b"9" * 5000)
    contents["5.json"] = b'{"label": 5}'
    files = []
    for name, content in contents.items():
        files += [(f"{name[0]}.png", image), (name, content)]
    shard = write_tar("long.tar", files)
    dataset = make(shard, label_key=["cls", "json.label"], max_skipped=1.0)
    with pytest.warns(UserWarning, match="label"):
        assert values(dataset, "labels") == [3, 4, 5]
    assert dataset.skipped.count == 2


@pytest.mark.parametrize("label", [0, 7, 2**31 - 1])
def test_usual_labels_are_numbers(label):
    for value in (label, float(label), str(label), f" {label}\n".encode(), [label]):
        assert Labels("cls").of({"cls": value}) == (label, None)


def test_samples_without_a_known_label_are_skipped_and_counted(labeled):
    options = {"label_key": "json.name", "class_names": ["cat", "fox"]}
    dataset = make(labeled, max_skipped=1.0, **options)
    with pytest.warns(UserWarning, match="unknown label"):
        assert values(dataset, "labels") == [0, 1, 0, 1]
    assert dataset.skipped.by_reason == {"unknown label": 2}


def test_fields_that_no_sample_has_are_an_error(labeled):
    with pytest.raises(ValueError, match=r"`label_key`, here \['label'\]"):
        make(labeled, label_key="label")
    with pytest.raises(ValueError, match=r"`caption_key`, here \['alt'\]"):
        make(labeled, caption_key="alt", include_captions=True)


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize(
    "options",
    [
        {"label_key": "json.missing"},
        {"label_key": "json.name", "class_names": ["x", "y"]},
        {"caption_key": "json.missing", "include_captions": True},
    ],
)
def test_entries_that_no_sample_has_are_an_error(labeled, options):
    with pytest.raises(ValueError, match=r"label|caption"):
        list(make(labeled, **options))


def test_bad_class_names_are_errors(labeled):
    with pytest.raises(ValueError, match=r"`class_names`.*Received: "):
        make(labeled, label_key="cls", class_names=["a", "a"])
    with pytest.raises(ValueError, match=r"`class_names`.*Received: "):
        make(labeled, label_key="cls", class_names=["a", " "])
    with pytest.raises(ValueError, match=r"`label_key`.*Received: "):
        make(labeled, class_names=["a", "b"])


def test_images_need_no_captions_without_a_tokenizer(labeled):
    dataset = make(labeled, include_keys=True)
    assert [*dataset.element_spec] == ["images", "keys"]
    assert values(dataset, "keys") == [b"%d" % index for index in range(6)]


def test_all_captions_of_an_image_are_tuples(write_tar, encode):
    image = encode(np.zeros((8, 8, 3), "uint8"))
    files = []
    for index, captions in enumerate((["a", "b"], ["c", "d"], ["e"])):
        content = json.dumps({"captions": captions}).encode()
        files += [(f"{index}.png", image), (f"{index}.json", content)]
    shard = write_tar("several.tar", files)
    dataset = make(shard, include_captions="all", caption_template="a {}.")
    assert values(dataset, "captions") == [
        (b"a a.", b"a b."),
        (b"a c.", b"a d."),
        (b"a e.",),
    ]
    with pytest.raises(ValueError, match=r"`include_captions`.*Received: .*'every'"):
        make(shard, include_captions="every")


def test_a_tf_dataset_holds_labels(labeled):
    pytest.importorskip("tensorflow")
    dataset = make(labeled, label_key="cls", format="tf")
    assert [*dataset.element_spec] == ["images", "labels"]
    labels = [batch["labels"].numpy().tolist() for batch in dataset]
    assert labels == [[0, 1, 2, 0], [1, 2]]


def test_numbers_of_numpy_are_labels():
    labels = Labels("label")
    assert labels.of({"label": np.int64(3)}) == (3, None)
    assert labels.of({"label": np.float32(2.0)}) == (2, None)
    assert labels.of({"label": np.float32(2.5)})[1] == "unknown label"
