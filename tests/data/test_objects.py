"""Objects as sources: threads, images of any kind, and their fingerprints."""

import concurrent.futures
import contextlib
import io
import threading

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data import stream
from keras_cluster_mask.data.images import Images
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.samples import Fields
from tests.data.reading import Counted, keys, make_dataset, take

pytestmark = pytest.mark.any_backend


def open_all(source):
    return open_index(source, Fields())


# === Threads ===


class Meeting(list):
    """Items whose readers wait for each other, and whose images do while they decode.

    Attributes:
        met: set of str. Where two threads were at the same time.
    """

    def __init__(self, thread_safe):
        super().__init__()
        self.thread_safe, self.met = thread_safe, set()
        self._barriers = {name: threading.Barrier(2) for name in ("item", "image")}

    def __len__(self):
        return 2

    def __getitem__(self, number):
        if threading.current_thread() is not threading.main_thread():
            self.meet("item")
        image = Image.new("L", (4, 4), number)
        image.load = lambda: self.meet("image") or Image.Image.load(image)
        return {"image": image, "text": "a"}

    def meet(self, place):
        with contextlib.suppress(threading.BrokenBarrierError):
            self._barriers[place].wait(0.2)
            self.met.add(place)


@pytest.mark.parametrize("thread_safe", [False, True, "yes"])
def test_one_thread_reads_an_object_unless_it_is_thread_safe(thread_safe):
    source = Meeting(thread_safe)
    # Two datasets may share an object.
    indexes = [open_all(source), open_all(source)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        pairs = [*threads.map(lambda index, n: next(index.read([n])), indexes, (0, 1))]
    assert [np.asarray(pair.image).max() for pair in pairs] == [0, 1]
    assert source.met == ({"item", "image"} if thread_safe is True else set())


@pytest.mark.parametrize("training", [False, True])
def test_rows_may_share_an_image_that_is_not_decoded_yet(encode, training, monkeypatch):
    monkeypatch.setattr(stream, "num_processors", lambda: 16)
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

    pairs = [*open_all(Reused()).read(range(3))]
    assert [np.asarray(pair.image).max() for pair in pairs] == [0, 1, 2]


@pytest.mark.parametrize("captions", [("one", "two"), ("one",)])
def test_an_image_may_be_a_path_a_key_bytes_and_others_arrays(captions, tmp_path):
    path = tmp_path / "1.png"
    Image.new("RGB", (4, 4)).save(path)
    # An array of one caption, as `numpy` makes it of a str, has no axis.
    found = {"image": path, "caption": np.array(captions).squeeze()}
    found |= {"__key__": "é".encode(), "cls": np.array(7)}
    (pair,) = open_index([found], Fields(label_key="cls")).read(range(1))
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
    assert (fault.file, fault.key) == ("list", "5")
    assert fault.reason.startswith(("the array is not uint8 (", "the gray levels are"))
    with pytest.raises(ValueError, match=r"`source`.*Received: .*the array is not"):
        make_dataset([{"image": np.zeros((4, 4, 1)), "text": "a"}])


# === Fingerprints ===


def test_the_fingerprint_of_an_object_depends_on_its_samples(noise, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(noise(0))

    def row(**changes):
        row = {"image": Image.open(io.BytesIO(noise(0))), "text": "one", "__key__": "a"}
        return {**row, **changes}

    changed = [
        {},
        {"text": "two"},
        {"__key__": "b"},
        {"text": ""},
        {"image": noise(0)},
        {"image": noise(0, (8, 8))},
        {"image": Image.new("L", (24, 20))},
        {"image": Image.open(io.BytesIO(noise(1)))},
        {"image": str(tmp_path / "a.png")},
        {"image": str(tmp_path / "b.png")},
        {"image": "https://host/c/"},
    ]
    sources = [[row()] * 9 + [row(**each)] for each in changed]
    fingerprints = {open_all(source).fingerprint for source in sources}
    assert len(fingerprints) == len(changed)
    # An object of the package `datasets` has one itself, which changes with files.
    Named = type("list", (list,), {"_fingerprint": "a"})
    named, plain = (open_all(cls(sources[0])) for cls in (Named, list))
    assert named.fingerprint == plain.fingerprint
    assert named.versions != plain.versions
    again = [row() for _ in range(10)]
    assert open_all(again).fingerprint == open_all(sources[0]).fingerprint


def test_few_samples_are_read_for_a_fingerprint():
    source = Counted([{"image": b"-", "text": "a"}] * 10**6)
    assert open_all(source).fingerprint
    assert len(source.read) < 40
    assert {0, 10**6 // 32 * 31} <= {*source.read}


def test_no_images_at_urls_and_no_shards_without_file_names_are_read(
    storage, write_pairs
):
    path = f"storage://{write_pairs('a.tar', 0, 8)}"
    index = open_all(path)
    storage.requests.clear()
    rows = open_all([{"image": path, "text": "a"}])
    assert all([rows.fingerprint, rows.versions, index.versions])
    assert not storage.requests


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
