"""Samples by their numbers, and what the index says about all of them."""

import io
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data import parts
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.samples import Fields, hash_of
from tests.data.reading import pairs_of

pytestmark = pytest.mark.any_backend


@pytest.fixture
def source(write_pairs, tmp_path, noise):
    """A pattern of 9 intact samples, 4 broken ones and two damaged shards."""
    broken = [
        *[("0001.png", noise(1)), ("0001.txt", b"a duplicate")],
        *[("silent.png", noise(2)), ("other.png", noise(2))],
        *[("blind.txt", b"no image"), ("last.png", noise(3)), ("last.txt", b"last")],
    ]
    write_pairs("0.tar", 0, 3, broken)
    (tmp_path / "1.tar").touch()
    cut = write_pairs("2.tar", 10, 4)
    cut.write_bytes(cut.read_bytes()[: 512 * 14])
    return str(write_pairs("3.tar", 20, 2).parent / "?.tar")


KEYS = ["0000", "0001", "0002", "last", "0010", "0011", "0012", "0020", "0021"]


def open_all(source, **options):
    return open_index(source, Fields(**options))


def keys(samples):
    return [sample.key for sample in samples]


def test_numbers_name_the_intact_samples_in_order(source):
    index = open_all(source)
    numbers = np.random.default_rng(0).integers(9, size=40).tolist()
    assert keys(index.read(numbers)) == [KEYS[number] for number in numbers]
    with pytest.raises(IndexError):
        [*index.read([9])]
    assert len(index) == 9
    for pair in index.read(range(4, 9)):
        assert pair.captions == (f"no {int(pair.key)}",)
        assert (np.asarray(Image.open(io.BytesIO(pair.image))) == int(pair.key)).all()


def test_faults_are_counted_by_reason_with_the_first_samples_of_each(source):
    index = open_all(source)
    folder = os.path.dirname(source)
    # The first shard has 8 samples, so 8 and 5 of them are lost.
    faults = {"damaged shard": 13, "no caption": 2, "duplicate key": 1, "no image": 1}
    assert index.faults == faults
    first, *others = index.examples(1)
    assert first.file == f"{folder}/1.tar"
    assert {(x.key, x.reason) for x in others} == {
        ("0001", "duplicate key"),
        ("silent", "no caption"),
        ("blind", "no image"),
    }
    _, second, *others = index.examples(9)
    assert f"{folder}/2.tar is damaged after the sample '0012'" in second.details
    assert len(others) == 4


def test_what_is_broken_depends_on_the_fields_that_are_wanted(source):
    assert len(open_all(source, wants_caption=False)) == 11
    index = open_all(source, caption_key="alt")
    assert (len(index), index.fields) == (0, {"png", "txt"})
    assert index.faults["no caption"] == 11
    index = open_all(source, wants_caption=False, label_key="json.label")
    assert index.faults["no label"] == 11


def test_a_pickle_holds_names_and_no_samples(tmp_path, write_tar):
    small = write_tar("a.tar", pairs_of([b"-"]))
    large = write_tar("b.tar", pairs_of([b"-"] * 2000))
    sizes = [len(pickle.dumps(open_all(each))) for each in (small, large)]
    assert sizes[1] < sizes[0] + 20 < 2000
    index = pickle.loads(pickle.dumps(open_all(large)))
    assert (len(index), index.fingerprint) == (2000, open_all(large).fingerprint)
    assert keys(index.read([1999, 0])) == ["1999", "00"]


# === The fingerprint ===


def test_the_fingerprint_names_samples_and_not_places(source, tmp_path):
    fingerprint = open_all(source).fingerprint
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("0.tar", "1.tar", "2.tar", "3.tar"):
        (moved / name).write_bytes((tmp_path / name).read_bytes())
    assert open_all(f"{moved}/*.tar").fingerprint == fingerprint


def test_the_fingerprint_differs_if_samples_or_fields_differ(source, write_pairs):
    first = open_all(source)
    others = [
        open_all(source[:-5] + "[023].tar"),
        open_all(source[:-5] + "[01].tar"),
        open_all(source, caption_key="alt"),
        open_all(source, image_keys="jpg"),
        open_all(source, wants_caption=False),
        open_all(source, label_key="json.label"),
    ]
    fingerprints = [each.fingerprint for each in [first, *others]]
    write_pairs("3.tar", 21, 2)
    fingerprints.append(open_all(source).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_the_fingerprint_covers_what_rows_hold(write_rows, name):
    def fingerprint(images, captions):
        pairs = zip(images, captions)
        rows = rows_of(*((0, f"{image}.png", "", text, 0) for image, text in pairs))
        return open_all(write_rows(name, rows)).fingerprint

    contents = [("aab", "xyz"), ("abb", "xyz"), ("bba", "xyz"), ("aab", "yxz")]
    found = [fingerprint(*each) for each in contents]
    assert len({*found}) == len(contents)
    assert fingerprint(*contents[0]) == found[0]


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_the_fingerprint_covers_images(write_tar, write_rows, name):
    def fingerprint(image, text):
        if name == "x.tar":
            return open_all(write_tar(name, [("1.png", image), ("1.txt", text)]))
        return open_all(write_rows(name, [{"image": image, "text": text.decode()}]))

    contents = (b"png", b"one"), (b"other", b"one"), (b"png", b"three")
    contents += ((b"gnp", b"one"),)
    assert len({fingerprint(*each).fingerprint for each in contents}) == 4


# === Changes while it is used ===


@pytest.mark.parametrize("is_indexed_again", [True, False])
@pytest.mark.parametrize(("key", "caption"), [("1", b"other"), ("2", b"one")])
def test_a_shard_that_changes_is_refused_by_name(
    write_tar, key, caption, is_indexed_again
):
    def write(key, caption):
        return write_tar("a.tar", [(f"{key}.png", b"png"), (f"{key}.txt", caption)])

    path = write("1", b"one")
    index = open_all(path)
    write(key, caption)
    if is_indexed_again:
        assert keys(open_all(path).read([0])) == [key]
        with pytest.raises(ValueError, match=r"must not change.*Received: .*a\.tar"):
            index.key_hashes()
    with pytest.raises(ValueError, match=r"must not change.*Received: .*a\.tar"):
        [*index.read([0])]


def test_a_shard_that_was_indexed_again_without_a_change_is_read(write_pairs):
    path = write_pairs("a.tar", 0, 4)
    index = open_all(path)
    os.utime(path, (1, 1))
    open_all(path)
    assert keys(index.read([3])) == ["0003"]


def test_an_index_that_was_deleted_is_read_while_it_is_open(tmp_path):
    folder, cache = tmp_path / "images", tmp_path / "index"
    folder.mkdir()
    (folder / "a.png").touch()
    (folder / "a.txt").write_text("t")
    index = open_index(folder, Fields(), cache)
    first = next(index.read([0]))
    shutil.rmtree(cache)
    assert next(index.read([0])) == first
    parts._mapped.cache_clear()
    message = rf"make the dataset again. Received: {cache}/.*deleted"
    with pytest.raises(ValueError, match=message):
        next(index.read([0]))


# === Formats ===


def test_a_source_may_have_several_formats(tmp_path, write_pairs, write_rows, encode):
    image = encode(np.zeros((4, 4, 3), "uint8"))
    write_pairs("c.tar", 0, 2)
    write_rows("b.parquet", [{"image": image, "caption": "p"}])
    (tmp_path / "a.png").write_bytes(image)
    write_rows("d.jsonl", [{"image": "a.png", "caption": ["j", "k"]}])
    index = open_all(f"{tmp_path}/[bcd].*")
    pairs = [*index.read([3, 0, 1, 2])]
    expected = [("j", "k"), ("p",), ("no 0",), ("no 1",)]
    assert [pair.captions for pair in pairs] == expected
    assert pairs[0].image == pairs[1].image == image


def test_more_shards_than_open_files_are_read(tmp_path, write_tar):
    resource = pytest.importorskip("resource")
    count = parts.MAX_OPEN + 100
    for index in range(count):
        write_tar(f"{index}.tar", [(f"{index}.jpg", b"j"), (f"{index}.txt", b"t")])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Of open files, new ones get the lowest free number.
    with open(tmp_path / "0.tar") as file:
        lowest = file.fileno()
    limit = lowest + parts.MAX_OPEN + 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        index = open_all(f"{tmp_path}/*.tar")
        assert len({*keys(index.read(range(count)))}) == count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# === Rows of one image ===


@pytest.fixture(autouse=True)
def empty_images(tmp_path):
    for name in "01abcdxyz":
        (tmp_path / f"{name}.png").touch()


def rows_of(*rows):
    names = ("id", "image", "other", "caption", "label")
    return [dict(zip(names, row)) for row in rows]


# The rows of an image need not be neighbors, and some may be broken.
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
    path = write_rows(name, ROWS)
    index = open_all(path, label_key="label")
    found = [*index.read([0, 1, 2], with_images=False)]
    captions = [("four",), ("one", "three"), ("two", "five")]
    assert [(pair.key, pair.captions, pair.label) for pair in found] == [
        *zip(("14", "11", "12"), captions, (1, 2, 3))
    ]
    assert [pair.path[-5:] for pair in found] == ["c.png", "a.png", "b.png"]
    assert index.key_hashes().tolist() == [hash_of(key) for key in ("14", "11", "12")]
    assert index.faults == {"no caption": 2}
    assert [fault.key for fault in index.examples(9)] == ["10", "15"]


def test_rows_are_grouped_by_the_field_that_is_read_as_image(write_rows):
    path = write_rows("x.jsonl", ROWS)
    indexes = [open_all(path, image_keys=key) for key in ("image", "other")]
    assert [len(index) for index in indexes] == [3, 3]
    (pair,) = indexes[1].read([2], with_images=False)
    assert (pair.key, pair.captions) == ("13", ("three", "four"))


def test_rows_of_one_image_with_different_labels_are_a_fault(write_rows):
    rows = rows_of((1, "a.png", "", "one", 3), (2, "a.png", "", "two", 4))
    index = open_all(write_rows("x.csv", rows), label_key="label")
    (fault,) = index.read([0])
    assert (fault.key, fault.reason) == ("1", "rows of one image with different labels")


def test_json_files_without_the_caption_do_not_count_as_captions(write_tar):
    """As img2dataset writes them: a JSON file for each image, and captions for most."""
    files = [
        (f"{n}.{end}", b'{"url": "u"}') for n in range(9) for end in ("jpg", "json")
    ]
    shard = write_tar("a.tar", sorted([*files, ("0.txt", b"t"), ("1.txt", b"t")]))
    index = open_all(shard)
    assert len(index) == 2
    assert index.faults == {"no caption": 7}
    assert len(open_all(shard, caption_key="json.url")) == 9
    assert len(open_all(shard, caption_key="json.caption")) == 0


def test_rows_without_an_image_are_samples_of_their_own(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("caption\none\ntwo\n")
    assert len(open_index(path, Fields(()))) == 2
