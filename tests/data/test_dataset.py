"""`image_text_dataset`: its sources, its arguments, and its errors."""

import functools
import inspect
import itertools
import pathlib
import pickle
import threading
import types

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.batches import num_images
from keras_cluster_mask.data import image_text_dataset
from tests.data.reading import TOKENIZER, keys, make_dataset, take

pytestmark = pytest.mark.any_backend

make = functools.partial(make_dataset, tokenizer=TOKENIZER, include_captions=True)


@pytest.fixture
def shards(write_pairs):
    return [
        write_pairs("a.tar", 0, 70),
        write_pairs("b.tar", 70, 20),
        write_pairs("c.tar", 90, 30),
    ]


def test_images_of_evaluation_are_counted_without_reading(shards):
    assert num_images(make(shards, batch_size=32)) == 120
    for index in range(2):
        part = make(shards, batch_size=32, process=(index, 2))
        assert num_images(part) == len(keys(part))
    assert num_images(make(shards, True)) is None


# === Objects as sources ===


def test_objects_with_images_of_any_kind_are_sources(encode, tmp_path):
    """The gray level of an image is its number, and an item is read by an int."""
    path = str(tmp_path / "a.png")
    images = [Image.new("RGB", (24, 20), (level,) * 3) for level in range(5)]
    contents = [*map(encode, images)]
    pathlib.Path(path).write_bytes(contents[2])
    kinds = images[0], contents[1], path, {"bytes": contents[3], "path": "unused"}
    source = [{"image": image, "text": "a"} for image in kinds]
    source.append({"image": {"bytes": None, "path": path}, "text": "a"})
    (batch,) = take(make(source))
    assert batch["keys"].tolist() == [*"01234"]
    assert batch["images"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 2]


# === Refusals ===


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, {"training": True, name: value})
            for name, values in {
                "resize": ["pad"],
                "crop_scale": [(0.5, 1.5), (0, 1), 0.9],
                "image_size": [0, (8, -1), "8", 16.0, None, (8, 8.0)],
                "seed": [-1, 0.5, None],
                "batch_size": [0, 8.0, True, 121],
                "num_workers": [-1, None],
                "max_skipped": [-0.1, 2],
                "block_size": [0, 3],
                "process": [(2, 2), (-1, 2)],
                "class_names": [["a"]],
                "tokenizer": ["clip"],
                "source": [{}, {"a.tar": 0}, {"a.tar": -1}, {"a.tar": "1"}],
            }.items()
            for value in values
        ),
        *(
            ("class_names", {"label_key": "cls", "class_names": names})
            for names in (["a", "a"], ["a", " "], ["1", "2"], "ab")
        ),
        ("crop_scale", {"training": True, "resize": "squash", "crop_scale": (0.4, 1)}),
        ("block_size", {"training": True, "block_size": 4, "process": (0, 4)}),
        ("batch_size", {"training": True, "process": (0, 5)}),
        ("source", {"source": {"a.tar": 1}}),
        ("block_size", {"block_size": 4}),
        ("crop_scale", {"crop_scale": (0.4, 1)}),
        ("image_transform", {"image_transform": len}),
        ("label_key", {"label_key": "label"}),
        ("caption_key", {"caption_key": "alt"}),
        ("image_keys", {"image_keys": "jpg"}),
    ],
)
def test_invalid_arguments_are_named(shards, name, options):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: "):
        make(**{"source": shards, **options})


def test_parquet_files_are_read_in_blocks(write_rows, encode):
    images = [encode(np.full((4, 4, 3), i, "uint8")) for i in range(64)]
    rows = [{"image": image, "caption": "a"} for image in images]
    dataset = make(write_rows("x.parquet", rows), True, batch_size=64)
    # A batch has 16 blocks.
    assert dataset.description["block_size"] == 4


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_source_without_pairs_is_refused_by_name(write_tar, shards, tmp_path):
    (tmp_path / "damaged.tar").write_bytes(b"x" * 2000)
    empty = write_tar("empty.tar", [])
    write_tar("other.tar", [("1.tif", b"x"), ("1.json", b"{}")])
    # One empty shard among others does no harm, but one source of several does.
    assert len(keys(make([*shards, empty]))) == 120
    mix = {str(shards[0]): 1, str(empty): 1}
    names = "damaged.tar", "empty.tar", "other.tar"
    for source, name in [*((f"{tmp_path}/{x}", x) for x in names), (mix, names[1])]:
        with pytest.raises(ValueError, match=rf"`source`.*{name}.*Received: "):
            make(source, True)


def test_the_documentation_names_each_argument():
    documented = inspect.getdoc(image_text_dataset)
    for name in inspect.signature(image_text_dataset).parameters:
        assert f"    {name}: " in documented


# === A dataset for a model ===


def model(**changes):
    """What the data reads of a model."""
    own = dict(tokenizer=TOKENIZER, image_size=(12, 16), resize="crop")
    return types.SimpleNamespace(preprocessing=own | changes)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_model_gives_tokenizer_size_and_resizing(shards, resize):
    found = image_text_dataset(shards, model(resize=resize), training=False)
    expected = image_text_dataset(
        shards, TOKENIZER, (12, 16), 64, training=False, resize=resize
    )
    assert found.tokenizer is TOKENIZER
    for first, second in zip(found, expected, strict=True):
        for name in ("images", "token_ids"):
            np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("count", [32, 48])
def test_many_processes_read_parquet_with_default_blocks(count, write_rows, encode):
    images = [encode(np.full((8, 8, 3), n, "uint8")) for n in range(200)]
    rows = [{"key": f"{n}", "image": x, "text": "a"} for n, x in enumerate(images)]
    table = write_rows("a.parquet", rows)

    def read(process):
        dataset = image_text_dataset(
            table, TOKENIZER, 8, 96, process=process, include_keys=True
        )
        return [*next(iter(dataset))["keys"]]

    parts = (read((index, count)) for index in range(count))
    assert sorted(itertools.chain(*parts)) == sorted(read((0, 1)))


def test_worker_processes_do_not_receive_the_model(shards):
    locked = model()
    locked.lock = threading.Lock()  # No pickle holds it.
    dataset = image_text_dataset(shards, locked, batch_size=8)
    assert pickle.loads(pickle.dumps(dataset._batches)).images.image_size == (12, 16)


def test_labels_of_a_model_need_no_captions(shards):
    labeled = dict(label_key="txt", class_names=["a"], max_skipped=1)
    with pytest.raises(ValueError, match="unknown label"):
        image_text_dataset(shards, model(tokenizer=None), training=False, **labeled)
    with pytest.raises(ValueError, match=r"set `model.tokenizer`.*tokenizer=None"):
        image_text_dataset(shards, model(tokenizer=None), training=False)


def test_what_a_model_defines_is_not_given_twice(shards):
    with pytest.raises(ValueError, match=r"`image_size` must be None.*\(12, 16\)"):
        image_text_dataset(shards, model(), 16)
    with pytest.raises(ValueError, match=r"`resize` must be None.*squash"):
        image_text_dataset(shards, model(), resize="squash")
    free = model(image_size=(None, None))
    with pytest.raises(ValueError, match=r"`image_size` must be .*None"):
        image_text_dataset(shards, free)
    dataset = image_text_dataset(shards, free, 16, training=False)
    assert dataset.element_spec["images"].shape[1:] == (16, 16, 3)
