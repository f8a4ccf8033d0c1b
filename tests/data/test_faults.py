"""What goes wrong while files are read: nothing is lost without being counted."""

import functools
import json
import os
import sys
import time

import numpy as np
import pytest

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats import parquet
from tests.data.reading import batches, keys, make_dataset, take

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:.*skipped"),
]

PAUSES = files.RETRY_AFTER
TRAINING = pytest.mark.parametrize("training", [False, True])


make = functools.partial(make_dataset, include_captions=True, batch_size=5)


def numbers(*ranges):
    return [f"{index:04}" for each in ranges for index in each]


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(files, "RETRY_AFTER", (0.0, 0.0))


@pytest.fixture
def shards(write_pairs):
    return [write_pairs(f"{i}.tar", 10 * i, 10) for i in range(3)]


# === Shards ===


def test_a_shard_that_vanishes_is_counted_and_others_are_read(shards):
    dataset = make(shards)
    shards[1].unlink()
    for _ in range(2):
        assert keys(dataset) == numbers(range(10), range(20, 30))
        assert dataset.skipped.by_reason == {"the shard cannot be read": 10}
    usual = make([shards[0], shards[2]], max_skipped=0.01)
    shards[2].unlink()
    with pytest.raises(ValueError, match=rf"{shards[2]}: .*No such file"):
        take(usual)


def test_a_shard_that_is_truncated_after_indexing_does_not_slow_training(
    shards, monkeypatch
):
    dataset, pauses = make(shards, True, batch_size=30), []
    monkeypatch.setattr(files, "RETRY_AFTER", (9.0,))
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    # A sample is four blocks.
    os.truncate(shards[1], 4 * 512 * 5)
    (batch,) = take(dataset, 1)
    expected = {*numbers(range(15), range(20, 30))}
    assert {*batch["keys"]} == expected
    assert dataset.skipped.by_reason == {"the shard cannot be read": 5}
    assert not pauses


class Silence:
    """Storage that never answers, and the clock of those who wait for it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def submit(self, *_):
        return self

    def result(self, seconds):
        # In real time a run ends at once, and no thread waits on before it does.
        time.sleep(0.005)
        self.now += seconds
        raise TimeoutError

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_storage_that_dies_in_training_ends_the_run_within_two_minutes(
    name, write_pairs, write_rows, noise, storage, monkeypatch
):
    if name == "a.tar":
        path = write_pairs(name, 0, 64)
    else:
        path = write_rows(name, [{"image": noise(n), "text": "t"} for n in range(64)])
    dataset, silence = make(f"storage://{path}", True, batch_size=64), Silence()
    parquet._read_group.cache_clear()
    monkeypatch.setattr(files, "RETRY_AFTER", PAUSES)
    monkeypatch.setattr(files, "time", silence)
    threads = files.Threads(1)
    monkeypatch.setattr(files, "Threads", lambda _: silence)
    # After the test, the call in progress ends before another test begins.
    with threads:
        with pytest.raises(TimeoutError, match=f"storage://{path} did not respond"):
            dataset._batches.read(threads, 0)
        assert 60 < silence.now <= 120


class Slow(Silence):
    """Storage that answers every request after 5 seconds, except for the fifth."""

    count = 0

    def submit(self, function, *arguments):
        self.count += 1
        self.call = functools.partial(function, *arguments)
        return self

    def result(self, seconds):
        needed = 1000 if self.count == 5 else 5
        self.now += min(seconds, needed)
        if seconds < needed:
            raise TimeoutError
        return self.call()


def test_one_slow_answer_does_not_end_the_index_of_a_large_shard(
    write_pairs, storage, monkeypatch
):
    slow = Slow()
    monkeypatch.setattr(files, "READ_AHEAD", 256)
    monkeypatch.setattr(files, "time", slow)
    monkeypatch.setattr(files, "Threads", lambda _: slow)
    path = write_pairs("a.tar", 0, 64)
    data = make(f"storage://{path}")
    assert data.num_samples == 64
    assert slow.now > 5 * slow.count


# === Images that tables name ===


@pytest.fixture
def folder(tmp_path, noise):
    """A table of intact rows and of one row with each fault."""
    folder = tmp_path / "folder"
    (folder / "images").mkdir(parents=True)
    names = [*(f"images/{index}.png" for index in range(10)), "../above.png"]
    for name in names:
        (folder / name).write_bytes(noise(0))
    (folder / "empty.png").touch()
    names += ["missing.png", "images", "nul\0.png", "n" * 5000, "\ud800.png"]
    names += ["empty.png", str(tmp_path / "above.png")]
    lines = [json.dumps({"file_name": name, "text": "a"}) for name in names]
    lines += ["broken", json.dumps({"file_name": names[0]}), json.dumps({"text": "a"})]
    lines += [json.dumps({"file_name": names[0], "text": ""})]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@TRAINING
def test_images_that_cannot_be_read_are_counted(folder, training):
    dataset = make(folder, training, batch_size=20)
    received = keys(dataset, 1)
    assert len(received) == (20 if training else 12)
    assert len({*received}) == 12
    assert dataset.skipped.by_reason == {
        "the image file cannot be read": 5,
        # An empty file.
        "the image cannot be decoded": 1,
        "a line that is not a JSON object": 1,
        "no image": 1,
    }


def test_missing_images_are_found_when_they_are_read(tmp_path, noise, write_rows):
    names = [f"{n:02}.png" for n in range(20)]
    write_rows("metadata.csv", [{"file_name": name, "text": "t"} for name in names])
    first = f"{tmp_path}/00.png"
    # The cause comes before all fields that were looked for.
    cause = rf"the sample '00.png' of .*: the image file cannot be read \({first}"
    with pytest.raises(ValueError, match=rf"^`source` has .*{cause}.*`image_keys`"):
        make(tmp_path)
    for name in names[2:]:
        (tmp_path / name).write_bytes(noise(0))
    with pytest.raises(ValueError, match=rf"{cause}.*1 broken of 20"):
        keys(make(tmp_path, max_skipped=0.01))
    dataset = make(tmp_path, max_skipped=0.1)
    assert keys(dataset) == names[2:]
    assert dataset.skipped.by_reason == {"the image file cannot be read": 2}


def test_a_sample_of_images_at_addresses_is_read_when_the_dataset_is_made(
    write_rows, memory, monkeypatch
):
    def table(address):
        rows = [{"file_name": f"{address}/{n}.png", "text": "t"} for n in range(10)]
        return write_rows("metadata.csv", rows)

    with pytest.raises(ValueError, match=r"memory://set/0.png.*Received: 10 samples"):
        make(table("memory://set"))
    with pytest.raises(ValueError, match=r"foo://set/0.png: .*Protocol not known"):
        make(table("foo://set"))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match=r"s3fs.*Received: .*s3://set/0.png"):
        make(table("s3://set"))


def test_images_at_addresses_are_read_beside_their_table(encode, memory):
    memory.pipe("/faults/a/1.png", encode(np.full((4, 4, 3), 7, "uint8")))
    lines = "file_name,text\na/1.png,one\nmissing.png,two\nmemory://faults/a/1.png,x\n"
    memory.pipe("/faults/metadata.csv", lines.encode())
    dataset = make("memory://faults")
    (batch,) = take(dataset)
    assert batch["captions"].tolist() == [("one",), ("x",)]
    assert (batch["images"] == 7).all()
    assert dataset.skipped.by_reason == {"the image file cannot be read": 1}


# === Errors through TensorFlow ===


def test_errors_in_a_tensorflow_dataset_can_be_read(shards):
    tf = pytest.importorskip("tensorflow")
    dataset = make(shards, True, image_transform=lambda *_: 1 / 0)
    with pytest.raises(tf.errors.OpError, match=r"'00.*ZeroDivision"):
        list(dataset.as_dataset())


def test_a_run_of_neighbors_in_a_lost_shard_is_replaced_by_others(write_pairs):
    """All others of a run are lost with it, so others must come from elsewhere."""
    paths = [write_pairs(f"{first}.tar", first, 64) for first in (0, 64, 128, 192)]
    dataset = make(paths, True, batch_size=128, block_size=32)
    paths[1].unlink()
    for batch in batches(dataset, 0, 2):
        assert len(batch) == 128
        assert not {*batch} & {*numbers(range(64, 128))}


def test_an_item_that_an_object_cannot_decode_is_replaced():
    class Items:
        def __len__(self):
            return 12

        def __getitem__(self, number):
            if number == 0:
                raise OSError("image file is truncated")
            return {"image": np.full((4, 4, 3), number, "uint8"), "caption": ("t",)}

    dataset = make(Items(), True, batch_size=12)
    (batch,) = take(dataset, 1)
    assert {*batch["keys"].tolist()} == {f"{n}" for n in range(1, 12)}
    assert dataset.skipped.by_reason == {"the sample cannot be read": 1}
