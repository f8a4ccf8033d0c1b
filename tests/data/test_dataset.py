"""`image_text_dataset`: its sources, its arguments, and its errors."""

import collections
import functools
import inspect
import pathlib
import pickle
import threading

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.batches import num_images
from keras_cluster_mask.data import image_text_dataset
from tests.data.reading import TOKENIZER, column, keys, make_dataset, take

pytestmark = pytest.mark.any_backend

make = functools.partial(make_dataset, tokenizer=TOKENIZER, include_captions=True)


@pytest.fixture
def shards(write_pairs):
    return [
        write_pairs("a.tar", 0, 70),
        write_pairs("b.tar", 70, 20),
        write_pairs("c.tar", 90, 30),
    ]


def test_evaluation_gives_every_sample_once_in_the_order_of_the_files(shards):
    received = take(make(shards, batch_size=32))
    assert [len(batch["images"]) for batch in received] == [32, 32, 32, 24]
    assert column(received, "keys") == [f"{index:04}" for index in range(120)]
    for batch in received:
        np.testing.assert_array_equal(batch["token_ids"], TOKENIZER(batch["captions"]))


def test_images_of_evaluation_are_counted_without_reading(shards):
    assert num_images(make(shards, batch_size=32)) == 120
    for index in range(2):
        part = make(shards, batch_size=32, process=(index, 2))
        assert num_images(part) == len(keys(part))
    assert num_images(make(shards, True)) is None


def test_channels_first_and_sizes_that_are_not_square(shards, data_format):
    (batch,) = take(make(shards, image_size=(8, 20), batch_size=120))
    is_first = data_format == "channels_first"
    assert batch["images"].shape == (120, *((3, 8, 20) if is_first else (8, 20, 3)))
    np.testing.assert_array_equal(batch["images"][:, 0, 0, 0], range(120))


# === Objects as sources ===


class Rows(collections.UserList):
    """Items that are read by an int, as in a `Dataset` of the package `datasets`."""

    def __getitem__(self, number):
        if not isinstance(number, int):
            raise TypeError(f"{type(number)} is not an int")
        return super().__getitem__(number)


def test_objects_with_images_of_any_kind_are_sources(encode, tmp_path):
    """The gray level of an image is its number."""
    source = Rows()
    for index in range(10):
        image = Image.new("RGB", (24, 20), (index,) * 3)
        content, path = encode(image), str(tmp_path / f"{index}.png")
        pathlib.Path(path).write_bytes(content)
        in_bytes = {"bytes": content, "path": "unused.png"}
        kinds = image, content, path, in_bytes, {"bytes": None, "path": path}
        row = {"image": kinds[index % 5], "text": f"no {index}", "label": index}
        source.append(row)
    batches = take(make(source, batch_size=4, label_key="label"))
    assert column(batches, "keys") == [f"{i}" for i in range(10)]
    assert column(batches, "captions") == [b"no %d" % i for i in range(10)]
    assert column(batches, "labels") == [*range(10)]
    levels = [image[0, 0, 0] for image in column(batches, "images")]
    assert levels == [*range(10)]
    training = make(source, True, batch_size=5)
    # An image that is read twice is as good as new.
    for _ in range(2):
        assert sorted(keys(training, 2)) == [str(i) for i in range(10)]


# === Mixing ===


def test_weights_mix_sources(shards):
    source = {str(shards[0]): 3, str(shards[1]): 1}
    dataset = make(source, True)
    assert (dataset.num_samples, len(dataset)) == (90, 11)
    levels = np.array([*map(int, keys(dataset, 30))])
    assert abs(np.sum(levels < 70) - 180) <= 1
    assert len({*levels}) == 90


# === Refusals ===


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("resize", ["pad"]),
        ("include_captions", ["some"]),
        ("crop_scale", [(0.5, 1.5), (0, 1), 0.9]),
        ("image_size", [0, (8, -1), "8", 16.0, None, (8, 8.0)]),
        ("seed", [-1, 0.5, None]),
        ("batch_size", [0, 8.0, True, 121]),
        ("num_workers", [-1, None]),
        ("max_skipped", [-0.1, 2]),
        ("block_size", [0, 3]),
        ("process", [(2, 2), (-1, 2)]),
        ("class_names", [["a"]]),
        ("tokenizer", ["clip"]),
        ("source", [3, None, {}, {"a.tar": 0}, {"a.tar": -1}, {"a.tar": "1"}]),
    ],
)
def test_invalid_arguments_are_named(shards, name, values):
    for value in values:
        options = {"source": shards, **{name: value}}
        with pytest.raises(ValueError, match=rf"`{name}`.*Received: "):
            make(training=True, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("crop_scale", {"training": True, "resize": "squash", "crop_scale": (0.4, 1)}),
        ("block_size", {"training": True, "block_size": 4, "process": (0, 4)}),
        ("batch_size", {"training": True, "process": (0, 5)}),
        ("source", {"source": {"a.tar": 1}}),
        ("sampling", {"sampling": len}),
        ("block_size", {"block_size": 4}),
        ("source", {"source": {"a.tar": 1}, "training": True, "sampling": len}),
        ("class_names", {"label_key": "cls", "class_names": ["a", "a"]}),
        ("class_names", {"label_key": "cls", "class_names": ["a", " "]}),
        ("class_names", {"label_key": "cls", "class_names": ["1", "2"]}),
        ("class_names", {"label_key": "cls", "class_names": "ab"}),
        ("crop_scale", {"crop_scale": (0.4, 1)}),
        ("image_transform", {"image_transform": len}),
        ("label_key", {"label_key": "label"}),
        ("caption_key", {"caption_key": "alt"}),
        ("image_keys", {"image_keys": "jpg"}),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(shards, name, options):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: "):
        make(**{"source": shards, **options})


def test_parquet_files_are_read_in_blocks(write_rows, encode):
    images = [encode(np.full((4, 4, 3), i, "uint8")) for i in range(64)]
    rows = [{"image": image, "caption": "a"} for image in images]
    dataset = make(write_rows("x.parquet", rows), True, batch_size=64)
    # A batch has 16 blocks.
    assert dataset.description["block_size"] == 4


def test_a_source_without_pairs_is_refused_by_name(write_tar, write_pairs, tmp_path):
    empty = write_tar("empty.tar", [])
    other = write_tar("other.tar", [("1.tif", b"x"), ("1.json", b"{}")])
    damaged = tmp_path / "broken.tar"
    damaged.write_bytes(b"x" * 2000)
    for source in (empty, other, damaged):
        with pytest.raises(ValueError, match=rf"`source`.*{source.name}.*Received: "):
            make(source)
    # One empty shard among others does no harm, but one source of several does.
    full = write_pairs("full.tar", 0, 3)
    assert len(keys(make([empty, full]))) == 3
    with pytest.raises(ValueError, match=r"`source`.*empty.tar.*Received: "):
        make({str(full): 1, str(empty): 1}, True)


def test_the_documentation_names_each_argument():
    documented = inspect.getdoc(image_text_dataset)
    for name in inspect.signature(image_text_dataset).parameters:
        assert f"    {name}: " in documented


# === A dataset for a model ===


class Model:
    """What the data reads of a model."""

    def __init__(self, tokenizer=TOKENIZER, image_size=(12, 16), resize="crop"):
        self.preprocessing = dict(
            tokenizer=tokenizer, image_size=image_size, resize=resize
        )


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_model_gives_tokenizer_size_and_resizing(shards, resize):
    model = Model(resize=resize)
    options = dict(training=False)
    found = image_text_dataset(shards, model, **options)
    expected = image_text_dataset(
        shards, TOKENIZER, (12, 16), 64, resize=resize, **options
    )
    assert found.tokenizer is TOKENIZER
    for first, second in zip(found, expected, strict=True):
        for name in ("images", "token_ids"):
            np.testing.assert_array_equal(first[name], second[name])


def test_worker_processes_do_not_receive_the_model(shards):
    model = Model()
    model.lock = threading.Lock()  # No pickle holds it.
    dataset = image_text_dataset(shards, model, batch_size=8)
    assert pickle.loads(pickle.dumps(dataset._batches)).images.image_size == (12, 16)


def test_labels_of_a_model_need_no_captions(shards):
    labeled = dict(label_key="txt", class_names=["a"], max_skipped=1)
    with pytest.raises(ValueError, match="unknown label"):
        image_text_dataset(shards, Model(None), training=False, **labeled)
    with pytest.raises(ValueError, match=r"set `model.tokenizer`.*tokenizer=None"):
        image_text_dataset(shards, Model(None), training=False)


def test_what_a_model_defines_is_not_given_twice(shards):
    with pytest.raises(ValueError, match=r"`image_size` must be None.*\(12, 16\)"):
        image_text_dataset(shards, Model(), 16)
    with pytest.raises(ValueError, match=r"`resize` must be None.*squash"):
        image_text_dataset(shards, Model(), resize="squash")
    free = Model(image_size=(None, None))
    with pytest.raises(ValueError, match=r"`image_size` must be .*None"):
        image_text_dataset(shards, free)
    dataset = image_text_dataset(shards, free, 16, training=False)
    assert dataset.element_spec["images"].shape[1:] == (16, 16, 3)
