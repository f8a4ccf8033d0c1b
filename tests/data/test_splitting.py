import io
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data import (
    check,
    read_captions,
    split,
    subset,
)
from tests.data.reading import (
    batches,
    keys,
    make_dataset,
    pairs_of,
    together,
)

pytestmark = pytest.mark.any_backend


@pytest.fixture
def write(tmp_path, write_tar, write_rows, encode):
    """Writes images of these gray levels in a format, and returns the source.

    A key begins with the level, which is the caption.
    """

    def write(format, name, levels):
        rows, members = [], []
        for number, level in enumerate(levels):
            array, key = np.full((4, 4, 3), level, "uint8"), f"{level} {number}"
            image = {"object": array, "csv": f"{name}/{key}.png"}
            image = image.get(format, encode(array))
            rows.append({"__key__": key, "image": image, "caption": f"{level}"})
            members += [(f"{key}.png", encode(array)), (f"{key}.txt", b"%d" % level)]
        if format == "tar":
            return write_tar(f"{name}.tar", members)
        (tmp_path / name).mkdir(exist_ok=True)
        for file, content in members:
            (tmp_path / name / file).write_bytes(content)
        sources = {"object": rows, "folder": tmp_path / name}
        return sources.get(format) or write_rows(f"{name}.{format}", rows)

    return write


def levels(source):
    return [int(key.split()[0]) for key in keys(make_dataset(source))]


def test_samples_stay_on_their_side_if_a_subset_is_split(write):
    source = write("object", "a", range(60))
    few = subset(source, range(0, 60, 2))
    for whole, part in zip(split(source, 0.4), split(few, 0.4)):
        assert levels(part) == [level for level in levels(whole) if level % 2 == 0]
    # A part of a part is split by another hash.
    train, _ = split(source, 0.4)
    again = split(subset(train, range(len(train))), 0.4)
    assert all(again)
    assert levels(again[0]) == levels(split(train, 0.4)[0])


@pytest.mark.parametrize("format", ["tar", "csv", "parquet", "folder", "object"])
def test_images_stay_on_one_side_whatever_else_a_source_holds(format, write):
    source = write(format, "a", [*range(30), *range(30)])
    if format != "object":
        source = [source, write(format, "b", range(10, 40))]
    parts = split(source, 0.4)
    train, test = map(levels, parts)
    assert (len(train), len(test)) == tuple(map(len, parts))
    assert sorted(train + test) == sorted(levels(source))
    assert {*train}.isdisjoint(test)
    assert [{*map(int, read_captions(x))} for x in parts] == [{*train}, {*test}]
    assert sorted(itertools.chain(*map(levels, split(parts[0])))) == sorted(train)
    # Other samples in another order.
    other = split(write(format, "c", [*range(100, 130), *range(40)[::-1]]), 0.4)
    assert all({*side} < {*levels(x)} for side, x in zip((train, test), other))


def test_rows_of_an_image_stay_together_whichever_caption_is_read(write, write_rows):
    folder = write("folder", "a", range(20))
    rows = [
        {"image": path.name, "caption": f"{path.stem} {i}", "alt": "b" * (i > 0)}
        for i, path in itertools.product(range(3), sorted(folder.glob("*.png")))
    ]
    source = write_rows("a/rows.csv", rows)
    parts = split(source)
    assert sum(map(len, parts)) == 20
    for part in parts:
        images = {*keys(make_dataset(part))}
        assert {*keys(make_dataset(part, caption_key="alt"))} == images
        expected = [row["caption"] for row in rows if row["image"] in images]
        assert sorted(read_captions(part)) == sorted(expected)
        assert check(part)["captions"] == len(expected)


@pytest.mark.parametrize("by", ["image", "key"])
def test_sides_have_their_shares_and_a_larger_one_only_adds(by):
    arrays = np.arange(2000, dtype="<u2").view("uint8").reshape(-1, 1, 2)
    source = [{"image": array, "caption": "a"} for array in arrays]
    old = set()
    for share in (0.1, 0.3, 0.5):
        _, test = split(source, share, by)
        found = {*keys(make_dataset(test))}
        # 5 standard deviations.
        assert abs(len(test) / 2000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5
        assert old < found
        old = found
    # Another seed, and another split of a part, are independent.
    other = {*keys(make_dataset(split(source, 0.5, by, seed=1)[1]))}
    again = [{*keys(make_dataset(x))} for x in split(test, 0.5, by)]
    for side in (other & old, *again):
        assert abs(len(side) / 2000 - 0.25) < 0.05
    assert again[0] ^ again[1] == old


def test_a_number_of_test_samples_is_kept_except_for_copies(write):
    source = write("object", "a", range(50))
    for test in (1, 20, 49):
        parts = split(source, test)
        assert [*map(len, parts)] == [50 - test, test]
        assert sorted([*levels(parts[0]), *levels(parts[1])]) == [*range(50)]
    assert {*levels(split(source, 10)[1])} < {*levels(split(source, 20)[1])}
    train, test = split(write("object", "b", [*range(25)] * 2), 9)
    assert (len(train), len(test)) == (42, 8)
    assert {*levels(train)}.isdisjoint(levels(test))


def faults(source):
    """The broken samples of a source, of which each reason must have at most 20."""
    examples = check(source)["examples"].values()
    return {(x["key"], x["reason"]) for x in itertools.chain(*examples)}


def test_unreadable_images_follow_their_keys(encode):
    def cut(seed):
        array = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), "uint8")
        return Image.open(io.BytesIO(encode(array)[:2000]))

    for image in (cut, "memory://none/{}.png".format, lambda n: None):
        source = [{"image": image(n), "caption": "a"} for n in range(20)]
        source.append({"image": encode(np.zeros((4, 4, 3), "uint8")), "caption": "a"})
        by_key = split(source, 0.5, "key")
        train, test = map(faults, by_key)
        assert [train, test] == [*map(faults, split(source, 0.5))]
        assert len(train | test) == len(train) + len(test) == 20


def test_broken_samples_are_counted_on_one_side(write_tar, noise):
    members = pairs_of([noise(n) for n in range(20)])
    for n in range(20):
        members += [(f"silent{n}.png", noise(n)), (f"blind{n}.txt", b"no image")]
        members += [(f"cut{n}.png", noise(n)[:-40]), (f"cut{n}.txt", b"truncated")]
    source = write_tar("a.tar", members)
    parts = split(source)
    train, test = map(faults, parts)
    assert train | test == faults(source)
    assert sum(check(x)["broken"] for x in parts) == 60


@pytest.mark.parametrize("format", ["tar", "object"])
def test_a_part_is_read_like_any_source(format, write):
    source = write(format, "a", range(60))
    train, test = split(source, 0.4)
    again = pickle.loads(pickle.dumps(train))
    expected = keys(make_dataset(train, True), 20)
    assert keys(make_dataset(again, True, num_workers=1), 20) == expected
    processes = [make_dataset(again, True, process=(n, 2)) for n in (0, 1)]
    assert together([batches(each, 0, 20) for each in processes]) == expected
    mixed = make_dataset({train: 3, test: 1}, True)
    assert mixed.num_samples == 60
    assert abs(np.isin(keys(mixed, 20), expected).mean() - 0.75) < 0.01
    # A run is not resumed on other samples.
    described = [
        str(make_dataset(each, True).description["sources"])
        for each in (train, again, test, source)
    ]
    assert described[0] == described[1]
    assert len({*described}) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"test": 1.0}, r"`test` must be in \(0, 1\)\. Received: test=1.0"),
        ({"test": 0}, r"`test` must be an integer of at least 1.* Received: test=0"),
        ({"test": 9}, r"`test` must leave.*Received: test=9, 9 samples"),
        ({"test": 1e-9}, r"`test` must leave.*Received: test=1e-09, 9 samples"),
        ({"by": "caption"}, "`by` must be one of.*Received: by='caption'"),
        ({"seed": -1}, "`seed` must be.*Received: seed=-1"),
        ({"source": {"a": 1}}, "`source` must be a path.*Received: source=dict"),
    ],
)
def test_wrong_arguments_are_named(wrong, message, write):
    with pytest.raises(ValueError, match=message):
        split(**{"source": write("tar", "a", range(9))} | wrong)
