"""Images with labels, and images with nothing else: what evaluation reads."""

import json

import numpy as np
import pytest

from keras_cluster_mask.data import ImageTextBatches, image_text_dataset

pytestmark = pytest.mark.any_backend


def make(source, tokenizer=None, **options):
    return ImageTextBatches(source, tokenizer, 8, 4, training=False, **options)


@pytest.fixture
def labelled(write_tar, encode):
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
    return write_tar("labelled.tar", files)


def values(batches, name):
    return [value for batch in batches for value in batch[name].tolist()]


@pytest.mark.parametrize(
    "options",
    [
        {"label_key": "cls"},
        {"label_key": ["missing", "json.label"]},
        {"label_key": "json.name", "class_names": ["cat", "dog", "fox"]},
        {"label_key": "json.label", "class_names": ["cat", "dog", "fox"]},
    ],
)
def test_labels_are_numbers_of_classes(labelled, options):
    batches = make(labelled, **options)
    assert [*batches.element_spec] == ["images", "labels"]
    assert values(batches, "labels") == [0, 1, 2, 0, 1, 2]
    assert next(iter(batches))["labels"].dtype == "int32"
    assert [image[0, 0, 0] for b in batches for image in b["images"]] == [*range(6)]


def test_labels_that_json_holds_as_other_than_whole_numbers(write_tar, encode):
    image = encode(np.zeros((8, 8, 3), "uint8"))
    files = []
    for index, label in enumerate((1.0, True, 1.5, "2", None)):
        content = json.dumps({"label": label}).encode()
        files += [(f"{index}.png", image), (f"{index}.json", content)]
    shard = write_tar("odd.tar", files)
    batches = make(shard, label_key="json.label", max_skipped=1.0)
    with pytest.warns(UserWarning, match="unknown label"):
        assert values(batches, "labels") == [1, 2]
    assert batches.skipped.by_reason == {"unknown label": 2, "no label": 1}


def test_labels_can_be_names_of_folders(tmp_path, encode):
    for folder in ("dog", "cat"):
        (tmp_path / folder).mkdir()
        for index in range(2):
            content = encode(np.zeros((8, 8, 3), "uint8"))
            (tmp_path / folder / f"{index}.png").write_bytes(content)
    batches = make(tmp_path, label_key="folder", class_names=["dog", "cat"])
    assert values(batches, "labels") == [1, 1, 0, 0]


def test_what_has_no_known_label_is_skipped_and_counted(labelled):
    options = {"label_key": "json.name", "class_names": ["cat", "fox"]}
    batches = make(labelled, max_skipped=1.0, **options)
    with pytest.warns(UserWarning, match="unknown label"):
        assert values(batches, "labels") == [0, 1, 0, 1]
    assert batches.skipped.by_reason == {"unknown label": 2}


def test_labels_that_nothing_holds_are_an_error(labelled):
    with pytest.raises(ValueError, match=r"`label_key`, here \['label'\]"):
        make(labelled, label_key="label")
    with pytest.raises(ValueError, match=r"known label.*Received: "):
        make(labelled, label_key="json.name")


def test_bad_class_names_are_errors(labelled):
    with pytest.raises(ValueError, match=r"`class_names`.*Received: "):
        make(labelled, label_key="cls", class_names=["a", "a"])
    with pytest.raises(ValueError, match=r"`class_names`.*Received: "):
        make(labelled, label_key="cls", class_names=["a", " "])
    with pytest.raises(ValueError, match=r"`label_key`.*Received: "):
        make(labelled, class_names=["a", "b"])


def test_images_need_no_captions_without_a_tokenizer(labelled):
    batches = make(labelled, include_keys=True)
    assert [*batches.element_spec] == ["images", "keys"]
    assert values(batches, "keys") == [b"%d" % index for index in range(6)]
    with pytest.raises(ValueError, match="`caption_key`"):
        make(labelled, lambda captions: [[0]] * len(captions))


def test_all_captions_of_an_image_come_as_tuples(write_tar, encode):
    image = encode(np.zeros((8, 8, 3), "uint8"))
    files = []
    for index, captions in enumerate((["a", "b"], ["c", "d"], ["e"])):
        content = json.dumps({"captions": captions}).encode()
        files += [(f"{index}.png", image), (f"{index}.json", content)]
    shard = write_tar("several.tar", files)
    batches = make(shard, include_captions="all", caption_template="a {}.")
    assert values(batches, "captions") == [
        (b"a a.", b"a b."),
        (b"a c.", b"a d."),
        (b"a e.",),
    ]
    with pytest.raises(ValueError, match=r"`include_captions`.*Received: 'every'"):
        make(shard, include_captions="every")
    pytest.importorskip("tensorflow")
    with pytest.raises(ValueError, match="`include_captions"):
        image_text_dataset(shard, None, 8, 4, False, include_captions="all")
    dataset = image_text_dataset(shard, None, 8, 4, False, label_key=None)
    assert [*dataset.element_spec] == ["images"]


def test_a_tf_dataset_holds_labels(labelled):
    pytest.importorskip("tensorflow")
    dataset = image_text_dataset(labelled, None, 8, 4, False, label_key="cls")
    labels = [batch["labels"].numpy().tolist() for batch in dataset]
    assert labels == [[0, 1, 2, 0], [1, 2]]
