"""What goes wrong with files: nothing is lost without being counted."""

import itertools
import json
import os
import re

import numpy as np
import pytest

from keras_cluster_mask.data import ImageTextBatches
from keras_cluster_mask.data.sources import ShardError

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:.*skipped"),
    pytest.mark.filterwarnings("ignore:Counting the pairs"),
]


def tokenizer(captions):
    return [[len(caption)] for caption in captions]


def make(source, training=False, **options):
    arguments = {"include_keys": True, "include_captions": True, "batch_size": 4}
    arguments.update(seed=1, drop_remainder=False)
    arguments.update(options)
    return ImageTextBatches(source, tokenizer, 8, training=training, **arguments)


def keys(batches):
    return [key.decode() for batch in batches for key in batch["keys"]]


def numbers(*ranges):
    return [f"{index:04}" for each in ranges for index in each]


@pytest.fixture
def shards(write_pairs):
    return [write_pairs(f"{i}.tar", 10 * i, 10) for i in range(3)]


TRAINING = pytest.mark.parametrize("training", [False, True])


@TRAINING
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_shard_without_a_byte_among_good_ones_is_counted(shards, training, place):
    shards[place].write_bytes(b"")
    batches = make(shards, training)
    good = numbers(*(range(10 * i, 10 * i + 10) for i in range(3) if i != place))
    assert sorted(keys(batches)) == good
    assert batches.skipped.samples == [(str(shards[place]), None, "damaged shard")]


@TRAINING
def test_a_shard_that_vanishes_is_counted_and_the_others_are_read(shards, training):
    batches = make(shards, training)
    shards[1].unlink()
    for _ in range(2):
        assert sorted(keys(batches)) == numbers(range(10), range(20, 30))
        samples = batches.skipped.samples
        assert samples == [(str(shards[1]), None, "unreadable shard")]
    strict = make([shards[0], shards[2]], training, on_error="raise")
    shards[2].unlink()
    with pytest.raises(ValueError, match=rf"shard {shards[2]}: .*No such file"):
        list(strict)


@TRAINING
def test_repeating_ends_with_an_error_if_all_shards_vanish(shards, training):
    batches = make(shards, training)
    endless = iter(batches.repeat())
    assert len(keys(next(endless) for _ in range(20))) > 70
    for shard in shards:
        shard.unlink()
    # What was read ahead still comes.
    with pytest.raises(ValueError, match=r"two epochs had none.*unreadable shard: 3"):
        list(itertools.islice(endless, 20))


def test_a_shard_that_may_not_be_read_is_counted_from_the_start(shards, monkeypatch):
    from keras_cluster_mask.data import files

    open_file = files.open_file

    def refuse(path, mode="rb"):
        if os.fspath(path) == str(shards[0]):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return open_file(path, mode)

    monkeypatch.setattr(files, "open_file", refuse)
    batches = make(shards)
    assert keys(batches) == numbers(range(10, 30))
    assert batches.skipped.by_reason == {"unreadable shard": 1}
    with pytest.raises(PermissionError, match=str(shards[0])):
        make(shards, on_error="raise")
    with pytest.raises(ValueError, match=r"no readable pair.*Permission denied"):
        make(shards[0])


@TRAINING
def test_a_shard_deleted_while_it_is_read_is_read_to_its_end(write_pairs, training):
    # Longer than what is read ahead.
    shard = write_pairs("x.tar", 0, 200)
    batches = make(shard, training, shuffle_buffer=4)
    epoch = iter(batches)
    first = next(epoch)
    shard.unlink()
    assert sorted(keys([first, *epoch])) == numbers(range(200))
    assert batches.skipped.count == 0


@TRAINING
def test_a_shard_cut_in_place_while_it_is_read_is_counted(
    write_pairs, training, monkeypatch
):
    monkeypatch.setattr("keras_cluster_mask.data.files.READ_AHEAD", 4096)
    shard = write_pairs("x.tar", 0, 200)
    # Without a buffer that reads all of it before the first batch.
    batches = make(shard, training, shuffle_buffer=4)
    epoch = iter(batches)
    first = next(epoch)
    # A pair is four blocks.
    os.truncate(shard, 512 * 4 * 150 + 700)
    assert sorted(keys([first, *epoch])) == numbers(range(150))
    assert batches.skipped.by_reason == {"damaged shard": 1}


def test_the_pair_at_the_end_of_a_cut_shard_counts_before_the_start(write_pairs):
    shard = write_pairs("x.tar", 0, 4)
    shard.write_bytes(shard.read_bytes()[: 512 * 4])
    # Its only pair is whole.
    assert keys(make(shard)) == ["0000"]
    assert len(keys(make(shard, training=True, batch_size=1))) == 1
    with pytest.raises(ShardError, match="0000"):
        make(shard, on_error="raise", drop_remainder=True)


def test_keys_that_come_again_do_not_fill_a_batch(write_pairs, encode):
    image = encode(np.zeros((4, 4, 3), "uint8"))
    again = [("0000.png", image), ("0000.txt", b"again")] * 5
    shard = write_pairs("x.tar", 0, 2, again)
    batches = make(shard)
    assert keys(batches) == ["0000", "0001"]
    assert batches.skipped.by_reason == {"duplicate key": 5}
    with pytest.raises(ValueError, match=r"`batch_size`.*batch_size=4, 2 pairs"):
        make(shard, drop_remainder=True)


@pytest.fixture
def folder(tmp_path, encode):
    """A manifest of good rows and of one of each kind of broken ones."""
    folder = tmp_path / "folder"
    (folder / "images").mkdir(parents=True)
    names = [f"images/{index}.png" for index in range(10)]
    for name in names:
        (folder / name).write_bytes(encode(np.zeros((4, 4, 3), "uint8")))
    (folder / "empty.png").touch()
    (tmp_path / "absolute.png").write_bytes(encode(np.zeros((4, 4, 3), "uint8")))
    names += ["missing.png", "images", "nul\0.png", "n" * 5000, "\ud800.png"]
    names += ["empty.png", str(tmp_path / "absolute.png"), "../absolute.png"]
    lines = [json.dumps({"file_name": name, "text": "a"}) for name in names]
    lines += ["broken", json.dumps({"file_name": names[0]}), json.dumps({"text": "a"})]
    lines += [json.dumps({"file_name": names[0], "text": ""})]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@TRAINING
def test_images_that_a_manifest_names_in_vain_are_counted(folder, training):
    batches = make(folder, training, max_skipped=1, batch_size=22)
    received = keys(batches)
    assert len(received) == (18 if training else 12)
    assert len({*received}) == 12
    assert batches.skipped.by_reason == {
        "the image file cannot be read": 5,
        "the image does not decode": 1,
        "a line that is not a JSON object": 1,
        "no caption": 1,
        "no image": 1,
        "empty caption": 1,
    }
    assert len({*received}) + batches.skipped.count == 22


def test_an_image_file_that_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr("keras_cluster_mask.data.decoding.MAX_BYTES", 10)
    batches = make(folder)
    assert keys(batches) == []
    assert batches.skipped.by_reason["file too large"] == 12


def test_images_at_addresses_are_read_beside_their_manifest(encode):
    system = pytest.importorskip("fsspec").filesystem("memory")
    image = encode(np.full((4, 4, 3), 7, "uint8"))
    system.pipe("/faults/a/1.png", image)
    lines = "file_name,text\na/1.png,one\nmissing.png,two\nmemory://faults/a/1.png,x\n"
    system.pipe("/faults/metadata.csv", lines.encode())
    batches = make("memory://faults")
    (batch,) = batches
    assert batch["captions"].tolist() == [b"one", b"x"]
    assert (batch["images"] == 7).all()
    assert batches.skipped.by_reason == {"the image file cannot be read": 1}
    system.rm("/faults", recursive=True)


@TRAINING
def test_huge_images_and_members_are_counted(write_pairs, encode, training):
    huge = encode(np.zeros((300, 300), "uint8"))
    files = [("a.png", huge), ("a.txt", b"a"), ("b.png", bytes(9000)), ("b.txt", b"b")]
    shard = write_pairs("x.tar", 0, 10, files)
    batches = make(shard, training, max_image_pixels=10_000, batch_size=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keras_cluster_mask.data.sources.webdataset.MAX_BYTES", 8000)
        assert {*keys(batches)} == {*numbers(range(10))}
    assert batches.skipped.by_reason == {
        "the image has too many pixels": 1,
        "file too large": 1,
    }


# === Too much of it ===


@pytest.fixture
def third_broken(write_tar, encode):
    """1,200 samples in two shards; of each three one has no caption."""
    image = encode(np.zeros((4, 4, 3), "uint8"))
    shards = []
    for number in range(2):
        files = []
        for index in range(600):
            files.append((f"{number}-{index}.png", image))
            if index % 3:
                files.append((f"{number}-{index}.txt", b"t"))
        shards.append(write_tar(f"third-{number}.tar", files))
    return shards


@TRAINING
def test_a_run_stops_once_more_of_it_is_broken_than_allowed(third_broken, training):
    assert len(keys(make(third_broken, training, max_skipped=0.36))) == 800
    batches = make(third_broken, training, max_skipped=0.3, batch_size=100)
    with pytest.raises(ValueError, match=r"More than 30%.*`max_skipped`") as error:
        list(batches)
    message = str(error.value)
    received = re.search(r"Received: (\d+) of the first (\d+),", message)
    count, looked_at = map(int, received.groups())
    assert looked_at >= 1000
    assert count > 0.3 * looked_at
    assert f"no caption: {count}" in message
    # Another thread may have found one more meanwhile.
    assert count <= batches.skipped.count <= count + 8


@TRAINING
def test_the_share_is_that_of_what_was_read_however_much_waits_in_the_buffer(
    third_broken, training, monkeypatch
):
    monkeypatch.setattr("keras_cluster_mask.data.skipped.ENOUGH", 100)
    batches = make(third_broken, training, max_skipped=0.4, shuffle_buffer=5000)
    assert len(keys(batches)) == 800
    assert batches.skipped.count == 400


def test_few_samples_say_little_about_the_share(write_pairs):
    broken = [(f"x{index}.png", b"-") for index in range(900)]
    batches = make(write_pairs("x.tar", 0, 5, broken), max_skipped=0.01)
    assert len(keys(batches)) == 5
    assert batches.skipped.count == 900


@pytest.mark.parametrize("max_skipped", [-0.1, 1.1])
def test_a_share_that_is_none_is_refused(shards, max_skipped):
    with pytest.raises(ValueError, match=rf"`max_skipped`.*Received: {max_skipped}"):
        make(shards, max_skipped=max_skipped)


# === The same through TensorFlow ===


@pytest.mark.parametrize("case", ["share", "raise", "vanished", "batch"])
def test_errors_in_a_tensorflow_dataset_can_be_read(
    third_broken, shards, write_tar, case
):
    tf = pytest.importorskip("tensorflow")
    from keras_cluster_mask.data import image_text_dataset

    options = {"batch_size": 4, "training": True, "seed": 0}
    if case == "share":
        source, message = third_broken, r"More than 10% of the samples are broken"
        options.update(max_skipped=0.1)
    elif case == "raise":
        source, message = third_broken, r"'\d-\d+' of the shard .*\.tar: no caption"
        options.update(on_error="raise")
    elif case == "vanished":
        source, message = shards, rf"The shard {shards[2]}: .*No such file"
        options.update(on_error="raise")
    else:
        files = [(f"{i}.{end}", b"-") for i in range(9) for end in ("png", "txt")]
        source = write_tar("x.tar", files)
        message = "No image of a batch decodes"
    dataset = image_text_dataset(source, tokenizer, 8, **options)
    shards[2].unlink()
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        list(dataset)


def test_a_tensorflow_dataset_counts_as_plain_batches_do(folder, third_broken):
    pytest.importorskip("tensorflow")
    from keras_cluster_mask.data import image_text_dataset

    for source in (folder, third_broken):
        dataset = image_text_dataset(source, tokenizer, 8, 4, training=False)
        given = sum(len(batch["images"]) for batch in dataset)
        batches = make(source)
        assert given == len(keys(batches))
        assert dataset.skipped.by_reason == batches.skipped.by_reason
        assert given + dataset.skipped.count == (22 if source == folder else 1200)
