"""The one reader of batches, from data of any kind."""

import pathlib

import keras
import numpy as np
import pytest
from keras import ops

from keras_cluster_mask.batches import (
    num_images,
    read_batches,
    read_images,
)
from tests.helpers import Batches, split

IMAGES = np.arange(70 * 4 * 4 * 3, dtype="float32").reshape(70, 4, 4, 3)
LABELS = np.arange(70) % 3
WHOLE = {"images": IMAGES, "labels": LABELS}
SIZES = 30, 30, 10


def in_batches():
    return split(WHOLE, 30)


def as_tensors(batch):
    return {name: ops.convert_to_tensor(values) for name, values in batch.items()}


def as_tf_dataset():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(WHOLE).batch(30)


# === What is read ===


class Counted(keras.utils.PyDataset):
    """Batches whose number is given as Keras 3 asks for it."""

    num_batches = len(SIZES)

    def __getitem__(self, index):
        return in_batches()[index]


KINDS = {
    "list": in_batches,
    "generator": lambda: iter(in_batches()),
    "dictionary": lambda: WHOLE,
    "dictionary_of_tensors": lambda: as_tensors(WHOLE),
    "pair": lambda: (IMAGES, LABELS),
    "py_dataset": lambda: Batches(in_batches()),
    "py_dataset_without_a_length": Counted,
    "tf_dataset": as_tf_dataset,
    "tensors": lambda: [*map(as_tensors, in_batches())],
    "pairs": lambda: [tuple(batch.values()) for batch in in_batches()],
    "pairs_of_a_dictionary": lambda: [
        ({"images": batch["images"]}, batch["labels"]) for batch in in_batches()
    ],
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_data_of_any_kind_gives_dictionaries_of_numpy_arrays(kind):
    # Other data than arrays keeps its own batches.
    found = [*read_batches(KINDS[kind](), batch_size=30)]
    assert [len(batch["images"]) for batch in found] == [*SIZES]
    for name, values in WHOLE.items():
        parts = [batch[name] for batch in found]
        assert {type(part) for part in parts} == {np.ndarray}
        np.testing.assert_array_equal(np.concatenate(parts), values)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "data",
    [
        [IMAGES],
        IMAGES[:9],
        [(IMAGES, None)],
        [{"images": IMAGES, "token_ids": None}],
    ],
)
def test_images_alone_are_batches_and_entries_that_are_none_are_left_out(data):
    (batch,) = read_batches(data)
    assert list(batch) == ["images"]


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "captions",
    [
        [["a", "b"], ["c"], ["d", "e", "f"]],
        [["a", "b"], ["c", "d"], ["e", "f"]],
        np.array([["a", "b"], ["c", "d"], ["e", "f"]]),
    ],
)
def test_several_captions_of_an_image_stay_together(captions):
    (batch,) = read_batches({"images": IMAGES[:3], "captions": captions})
    assert batch["captions"].shape == (3,)
    found = [[*each] for each in batch["captions"]]
    assert found == [[*each] for each in captions]


@pytest.mark.any_backend
def test_one_caption_of_an_image_is_a_string():
    for captions in (["a", "bc"], np.array(["a", "bc"]), [b"a", b"bc"]):
        (batch,) = read_batches({"images": IMAGES[:2], "captions": captions})
        assert batch["captions"].tolist() == list(captions)


# === Images ===


@pytest.mark.any_backend
def test_images_are_read_without_empty_batches():
    batches = [IMAGES[:0], {"images": IMAGES[:2]}, IMAGES[2:2], (IMAGES[2:5], None)]
    assert [len(images) for images in read_images(batches)] == [2, 3]


@pytest.mark.any_backend
@pytest.mark.parametrize(("max_images", "batches"), [(1, 1), (8, 1), (9, 2), (16, 2)])
def test_reading_stops_at_max_images(max_images, batches):
    read = []

    def endless():
        while True:
            read.append(1)
            yield IMAGES[:8]

    found = np.concatenate([*read_images(endless(), max_images)])
    assert len(found) == max_images
    assert len(read) == batches
    # There may be fewer.
    assert sum(map(len, read_images(IMAGES, max_images=1000))) == 70


@pytest.mark.any_backend
def test_images_of_arrays_are_counted_without_reading():
    for whole in (IMAGES, (IMAGES, LABELS), WHOLE):
        assert num_images(whole) == 70
    assert num_images(in_batches()) is None
    assert num_images(iter(in_batches())) is None


# === Bad data ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"token_ids": [1]}, r"the key 'images'.*Received: keys=\['token_ids'\]"),
        ([(IMAGES, [[1]], [0])], "a pair.*Received: a tuple of 3"),
        ([{"photos": 3}], r"the key 'images'.*Received: keys=\['photos'\]"),
        (
            {"images": np.zeros((2, 1)), "labels": [1]},
            "equal lengths.*Received: images of 2, labels of 1",
        ),
        ([(np.zeros((2, 1)), 3)], "equal lengths.*images of 2, labels of None"),
        *(
            (files, r"as arrays.*image_text_dataset.*Received: images=.*a\.png")
            for path in ("a.png", pathlib.Path("a.png"))
            for files in (path, [path], ([path], ["text"]))
        ),
    ],
)
def test_bad_data_is_an_error_that_says_so(data, message):
    for read in (read_batches, read_images):
        with pytest.raises(ValueError, match=message):
            [*read(data)]


@pytest.mark.any_backend
@pytest.mark.parametrize("data", [[], IMAGES[:0], [IMAGES[:0]], {"images": []}])
def test_data_without_an_image_is_an_error_where_one_is_needed(data):
    assert sum(len(batch["images"]) for batch in read_batches(data)) == 0
    message = "`data` must contain at least one image. Received: data="
    with pytest.raises(ValueError, match=message):
        [*read_images(data)]
