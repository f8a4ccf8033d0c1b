"""Sources: objects, several in a row, parts, and what identifies their samples."""

import concurrent.futures
import io
import pickle
import threading
import time

import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.data import dataset as dataset_module
from keras_cluster_mask.data.images import Images
from keras_cluster_mask.data.paths import open_source
from keras_cluster_mask.data.samples import Fields
from keras_cluster_mask.data.sources import describe, read_items
from tests.data.reading import Counted, keys, make_dataset, read_samples, take

pytestmark = pytest.mark.any_backend


def fingerprint(source, **options):
    fields = Fields(**options)
    return str(describe(open_source(source, fields.image_keys), fields))


# === Several sources ===


def test_sources_of_any_kind_may_follow_one_another(
    tmp_path, write_pairs, write_rows, encode
):
    image = encode(np.zeros((4, 4, 3), "uint8"))
    write_pairs("c.tar", 0, 2)
    write_rows("b.parquet", [{"image": image, "caption": "p"}])
    (tmp_path / "a.png").write_bytes(image)
    write_rows("d.jsonl", [{"image": "a.png", "caption": ["j", "k"]}])
    expected = [("p",), ("no 0",), ("no 1",), ("j", "k")]
    pairs, _ = read_samples(f"{tmp_path}/[bcd].*", with_images=True)
    assert [pair.captions for pair in pairs] == expected
    assert pairs[0].image == pairs[-1].image == image
    # An object, a path, and a part.
    rows = [{"image": image, "caption": f"{n}"} for n in range(3)]
    several = [rows, open_source(tmp_path / "c.tar"), kcm.data.subset(rows, [2, 0, 2])]
    found = [x.captions[0] for x in read_samples(several)[0]]
    assert found == ["0", "1", "2", "no 0", "no 1", "2", "0", "2"]
    assert open_source(several)[5]["caption"] == "2"
    with pytest.raises(IndexError):
        open_source(several)[8]


def test_a_subset_has_the_chosen_samples_in_their_order(write_pairs):
    source = open_source(write_pairs("a.tar", 0, 9))
    part = kcm.data.subset(source, np.array([7, 1, 7]))
    assert [part[n]["__key__"] for n in range(len(part))] == ["0007", "0001", "0007"]
    again = pickle.loads(pickle.dumps(part))
    assert fingerprint(again) == fingerprint(part) != fingerprint(source)
    for wrong in ([], [9], [-1], [0.5], [[1]], [True]):
        with pytest.raises(ValueError, match=r"`indices` must .*a source of 9 samples"):
            kcm.data.subset(source, wrong)


def test_the_rows_of_an_image_are_a_sample_of_a_subset(write_rows):
    rows = [{"photo": f"{n // 2}.png", "caption": f"{n}"} for n in range(6)]
    part = kcm.data.subset(write_rows("x.csv", rows), [2, 0], image_keys="photo")
    assert [item["caption"] for item in part] == [["4", "5"], ["0", "1"]]


# === What identifies samples ===


def test_the_description_names_samples_and_not_places(write_pairs, tmp_path):
    path = write_pairs("0.tar", 0, 3)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "1.tar").write_bytes(path.read_bytes())
    assert fingerprint(moved / "1.tar") == fingerprint(path)
    others = [
        fingerprint(path, caption_key="alt"),
        fingerprint(path, image_keys="jpg"),
        fingerprint(path, wants_caption=False),
        fingerprint(path, label_key="json.label"),
        fingerprint(write_pairs("2.tar", 0, 4)),
        fingerprint(write_pairs("3.tar", 1, 3)),
    ]
    assert len({fingerprint(path), *others}) == 7


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_the_description_covers_all_that_rows_hold(write_rows, name):
    """Also of samples that are not among the few that are read."""

    def of(images, captions):
        pairs = zip(images * 99, captions * 99)
        rows = [
            {"image": f"{n}{image}.png", "caption": text, "n": n}
            for n, (image, text) in enumerate(pairs)
        ]
        return fingerprint(write_rows(name, rows))

    contents = [("aab", "xyz"), ("abb", "xyz"), ("bba", "xyz"), ("aab", "yxz")]
    found = [of(*each) for each in contents]
    assert len({*found}) == len(contents)
    assert of(*contents[0]) == found[0]


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_the_description_covers_images(write_tar, write_rows, name):
    def of(image, text):
        if name == "x.tar":
            return fingerprint(write_tar(name, [("1.png", image), ("1.txt", text)]))
        row = {"image": image, "text": text.decode()}
        return fingerprint(write_rows(name, [row]))

    contents = (b"png", b"one"), (b"gnp", b"one"), (b"other", b"one"), (b"png", b"two")
    assert len({of(*each) for each in contents}) == 4


def test_the_description_of_an_object_depends_on_its_samples(noise, tmp_path):
    def row(**changes):
        row = {"image": Image.open(io.BytesIO(noise(0))), "text": "one", "__key__": "a"}
        return {**row, **changes}

    changed = [
        {},
        {"text": "two"},
        {"__key__": "b"},
        {"text": ""},
        {"image": noise(0)},
        {"image": Image.open(io.BytesIO(noise(1)))},
        {"image": Image.new("L", (5, 4))},
        {"image": np.zeros((4, 4), "uint8")},
        {"image": np.ones((4, 4), "uint8")},
    ]
    sources = [[row()] * 9 + [row(**each)] for each in changed]
    assert len({*map(fingerprint, sources)}) == len(changed)
    # An object may have a fingerprint itself.
    Named = type("list", (list,), {"fingerprint": "a"})
    assert fingerprint(Named(sources[0])) != fingerprint(sources[0])
    again = [row() for _ in range(10)]
    assert fingerprint(again) == fingerprint(sources[0])


def test_few_samples_are_read_for_a_description():
    source = Counted([{"image": b"-", "text": "a"}] * 10**6)
    assert fingerprint(source)
    assert 32 <= len(source.read) < 70


# === Threads ===


def test_one_thread_at_a_time_reads_an_object():
    class Source(list):
        busy = threading.Lock()

        def __getitem__(self, number):
            assert self.busy.acquire(blocking=False)
            time.sleep(0.01)
            self.busy.release()
            return super().__getitem__(number)

    rows = Source({"image": np.full((4, 4), n, "uint8"), "text": "a"} for n in range(8))
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        items = [*threads.map(lambda number: read_items(rows, [number]), range(8))]
    assert [item["image"].max() for (item,) in items] == [*range(8)]


@pytest.mark.parametrize("training", [False, True])
def test_rows_may_share_an_image_that_is_not_decoded_yet(encode, training, monkeypatch):
    monkeypatch.setattr(dataset_module, "num_processors", lambda: 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    array = np.random.default_rng(0).integers(0, 256, (600, 400, 3), "uint8")
    content = encode(array, exif=exif)
    rows = [{"image": Image.open(io.BytesIO(content)), "text": "a"}] * 128
    options = {"resize": "squash", "batch_size": 128}
    (batch,) = take(make_dataset(rows, training, **options), 1)
    expected = Images((16, 16), training, "squash")(content, np.random.default_rng(0))
    # Decoding does not reduce an open image.
    assert np.abs(batch["images"].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["array", "image"])
def test_an_object_may_return_the_same_image_with_other_pixels(kind):
    class Reused:
        def __init__(self):
            self.array = np.zeros((4, 4), "uint8")
            self.image = Image.new("L", (4, 4))

        def __len__(self):
            return 3

        def __getitem__(self, number):
            self.array[:] = number
            self.image.paste(number, (0, 0, 4, 4))
            return {"image": getattr(self, kind), "text": "a"}

    pairs, _ = read_samples(Reused())
    assert [np.asarray(pair.image).max() for pair in pairs] == [0, 1, 2]


def test_neighbors_of_an_object_are_read_together_if_it_can():
    class Source(list):
        requests = []

        def __getitems__(self, numbers):
            self.requests.append(numbers)
            return [self[number] for number in numbers]

    rows = [{"image": np.zeros((4, 4), "uint8"), "text": "a"}] * 64
    dataset = make_dataset(Source(rows), True, batch_size=64, block_size=32)
    Source.requests.clear()
    (batch,) = take(dataset, 1)
    assert all(len(numbers) % 32 == 0 for numbers in Source.requests)
    assert {*batch["keys"]} == {f"{n}" for n in range(64)}


def test_an_error_of_the_method_that_reads_neighbors_ends_the_run():
    class Source(list):
        def __getitems__(self, numbers):
            return [self[number] for number in numbers[:-1]]

    rows = Source([{"image": np.zeros((4, 4), "uint8"), "text": "a"}] * 8)
    with pytest.raises(RuntimeError, match=r"\[0, 1, 2, 3\].*zip"):
        read_items(rows, [0, 1, 2, 3])


@pytest.mark.parametrize("captions", [("one", "two"), ("one",)])
def test_an_image_may_be_a_path_a_key_bytes_and_others_arrays(captions, tmp_path):
    path = tmp_path / "1.png"
    Image.new("RGB", (4, 4)).save(path)
    # An array of one caption, as `numpy` makes it of a str, has no axis.
    found = {"image": path, "caption": np.array(captions).squeeze()}
    found |= {"__key__": "é".encode(), "cls": np.array(7)}
    (pair,), _ = read_samples([found], label_key="cls")
    assert (pair.path, pair.captions) == (str(path), captions)
    assert (pair.key, pair.label) == ("é", 7)


# === Arrays ===


def gradient(dtype, *shape):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (gradient("uint8", 16, 16), range(256)),
        (gradient("int32", 16, 16), range(256)),
        (gradient("float32", 16, 16), range(256)),
        (gradient("uint16", 16, 16) * 257, range(256)),
        (gradient(">u2", 16, 16) * 257, range(256)),
        (gradient("uint8", 16, 16) > 99, (np.arange(256) > 99) * 255),
        (np.repeat(gradient("uint8", 16, 16, 1), 3, 2), range(256)),
    ],
)
def test_arrays_are_converted_exactly(array, expected):
    (batch,) = take(make_dataset([{"image": array, "text": "a"}]))
    levels = batch["images"][0, :, :, 1].ravel()
    np.testing.assert_array_equal(levels, np.ravel(expected))


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize(
    "array",
    [
        gradient("float32", 16, 16, 3),
        gradient("uint8", 16, 16, 1),
        gradient("uint8", 3, 16, 16),
        gradient("int64", 16, 16),
        gradient("uint8", 256),
        gradient("float32", 16, 16) / 255,
        gradient("float32", 16, 16) * np.nan,
        gradient("int32", 16, 16) * 9,
        gradient("int32", 16, 16) - 1,
    ],
)
def test_arrays_that_are_no_images_are_refused_with_their_key(array):
    rows = [{"image": np.zeros((4, 4), "uint8"), "text": "a"} for _ in range(8)]
    rows[5]["image"] = array
    dataset = make_dataset(rows)
    assert keys(dataset) == [*"01234", *"67"]
    ((fault,),) = dataset.skipped.examples.values()
    assert (fault.file, fault.key) == ("", "5")
    assert fault.reason.startswith(("the array is not uint8 (", "the gray levels are"))
    with pytest.raises(ValueError, match=r"`source`.*the array is not.*Received: "):
        make_dataset([{"image": np.zeros((4, 4, 1)), "text": "a"}])


# === Rows of one image ===


def rows_of(*rows):
    names = ("id", "image", "other", "caption", "label")
    return [dict(zip(names, row)) for row in rows]


# The rows of an image need not be neighbors, and some may have no caption.
ROWS = rows_of(
    (10, "c.png", "x.png", "", 1),
    (11, "a.png", "y.png", "one", 2),
    (12, "b.png", "x.png", "two", 3),
    (13, "a.png", "z.png", "three", 2),
    (14, "c.png", "z.png", "four", 1),
    (15, "d.png", "z.png", "", 4),
    (16, "b.png", "x.png", "five", 3),
    (17, "a.png", "y.png", " ", 2),
)


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.parquet"])
def test_rows_of_one_image_are_one_sample(write_rows, name):
    pairs, faults = read_samples(write_rows(name, ROWS), label_key="label")
    captions = [("four",), ("one", "three"), ("two", "five")]
    assert [(pair.key, pair.captions, pair.label) for pair in pairs] == [
        *zip(("10", "11", "12"), captions, (1, 2, 3))
    ]
    assert [pair.path[-5:] for pair in pairs] == ["c.png", "a.png", "b.png"]
    assert faults == [("15", "no caption")]


def test_the_image_of_rows_is_the_field_that_is_wanted(write_rows):
    path = write_rows("x.csv", ROWS)
    pairs, faults = read_samples(path, image_keys="other")
    assert (len(pairs), faults) == (3, [])
    assert [pair.path[-5:] for pair in pairs] == ["x.png", "y.png", "z.png"]


def test_lists_of_captions_of_several_rows_are_one_list(write_rows):
    rows = [{"image": "a.png", "captions": texts} for texts in (["a", "b"], ["c"])]
    (pair,), _ = read_samples(write_rows("x.jsonl", rows))
    assert pair.captions == ("a", "b", "c")


def test_rows_of_one_image_with_different_labels_are_broken(write_rows):
    rows = rows_of((1, "a.png", "", "one", 3), (2, "a.png", "", "two", 4))
    found = read_samples(write_rows("x.csv", rows), label_key="label")
    assert found == ([], [("1", "unknown label")])


def test_rows_without_an_image_are_samples_of_their_own(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("caption\none\ntwo\n")
    pairs, faults = read_samples(path, image_keys=())
    assert (len(pairs), faults) == (2, [])


# === Refusals ===


# An item of an array, as of a DataFrame, is no dictionary; the others have no length.
@pytest.mark.parametrize(
    "source",
    [np.array(["a"]), iter([]), 3, None, [("a.png", "a")], (["a.png"], ["a"]), [b"a"]],
)
def test_objects_that_are_no_samples_are_refused_with_a_remedy(source):
    remedy = r"in pairs\].*'records'.*without streaming.*Received: source="
    with pytest.raises(ValueError, match=rf"`source`.*{remedy}{type(source).__name__}"):
        make_dataset(source)
