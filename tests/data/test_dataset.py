import subprocess
import sys

import keras
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from keras_cluster_mask.data import (  # noqa: E402
    CLIPTokenizer,
    SkippedSamples,
    image_text_dataset,
)

pytestmark = pytest.mark.any_backend

TOKENIZER = CLIPTokenizer.train([f"no {i}" for i in range(200)], 600, context_length=9)


def make(source, training=False, **options):
    arguments = {"tokenizer": TOKENIZER, "image_size": 16, "batch_size": 8}
    arguments.update(include_keys=True, include_captions=True)
    return image_text_dataset(source, training=training, **{**arguments, **options})


def batches(dataset):
    return [{name: value.numpy() for name, value in batch.items()} for batch in dataset]


def keys(dataset):
    return [key.decode() for batch in dataset for key in batch["keys"].numpy()]


@pytest.fixture
def shards(write_pairs):
    """Three shards of 70, 20 and 30 pairs: more and less than Python's chunks."""
    return [
        write_pairs("a.tar", 0, 70),
        write_pairs("b.tar", 70, 20),
        write_pairs("c.tar", 90, 30),
    ]


def test_evaluation_gives_every_sample_once_in_the_order_of_the_files(shards):
    dataset = make(shards, batch_size=32)
    received = batches(dataset)
    assert [len(batch["images"]) for batch in received] == [32, 32, 32, 24]
    assert keys(dataset) == [f"{index:04}" for index in range(120)]
    for batch in received:
        assert batch["images"].dtype == np.uint8
        assert batch["images"].shape[1:] == (16, 16, 3)
        levels = [int(key) for key in batch["keys"]]
        np.testing.assert_array_equal(batch["images"][:, 3, 5, 1], levels)
        captions = [b"no %d" % level for level in levels]
        assert batch["captions"].tolist() == captions
        assert batch["token_ids"].dtype == np.int32
        np.testing.assert_array_equal(batch["token_ids"], TOKENIZER(captions))


def test_training_gives_every_sample_once_in_another_order(shards):
    received = keys(make(shards, True, seed=0, batch_size=1))
    assert sorted(received) == [f"{index:04}" for index in range(120)]
    assert received != sorted(received)
    # Without a buffer the shards are still mixed chunk by chunk.
    mixed = keys(make(shards, True, seed=0, batch_size=1, shuffle_buffer=1))
    assert sorted(mixed) == sorted(received)


def test_training_drops_a_ragged_batch_unless_told_otherwise(shards):
    training = make(shards, True, batch_size=50)
    # Two of the third, of 60 from one epoch, open the next.
    assert [[len(b["keys"]) for b in training] for _ in range(2)] == [[50] * 2] * 2
    kept = make(shards, True, batch_size=50, drop_remainder=False)
    assert [len(b["keys"]) for b in kept] == [50, 50, 20]
    dropped = make(shards, batch_size=50, drop_remainder=True)
    assert [len(b["keys"]) for b in dropped] == [50, 50]
    for dataset in (training, dropped):
        assert dataset.element_spec["images"].shape == (50, 16, 16, 3)
        assert dataset.element_spec["token_ids"].shape == (50, 9)


@pytest.fixture
def clear_shard(write_tar, encode):
    """Images whose crops and backgrounds can be seen."""
    files = []
    for index in range(40):
        image = np.random.default_rng(index).integers(0, 256, (20, 30, 4), "uint8")
        files += [(f"{index}.png", encode(image)), (f"{index}.txt", b"text")]
    return write_tar("clear.tar", files)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_seed_fixes_every_epoch_and_epochs_differ(shards, clear_shard):
    options = {"seed": 3, "background": "random", "shuffle_buffer": 20}
    source = [*shards, clear_shard]
    one, other = make(source, True, **options), make(source, True, **options)
    epochs = [batches(one), batches(one)]
    assert_same(epochs[0], batches(other))
    assert_same(epochs[1], batches(other))
    orders = [[key for b in epoch for key in b["keys"]] for epoch in epochs]
    assert orders[0] != orders[1]
    another = make(source, True, **{**options, "seed": 4})
    assert keys(another) != [key.decode() for key in orders[0]]


def test_a_sample_is_cropped_and_backed_differently_in_each_epoch(clear_shard):
    dataset = make(
        clear_shard, True, background="random", crop_scale=(0.2, 0.8), seed=0
    )
    images = [
        {k: i for b in batches(dataset) for k, i in zip(b["keys"], b["images"])}
        for _ in range(2)
    ]
    assert len(images[0]) == 40
    assert all((images[0][key] != images[1][key]).any() for key in images[0])


def test_without_a_seed_keras_random_seed_decides(shards):
    orders = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        orders.append(keys(make(shards, True)))
    assert orders[0] == orders[1] != orders[2]


def test_evaluation_is_the_same_each_time_even_with_random_backgrounds(clear_shard):
    dataset = make(clear_shard, background="random")
    first = batches(dataset)
    assert_same(first, batches(dataset))
    assert_same(first, batches(make(clear_shard, background="random")))


@pytest.fixture
def broken_files(encode):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), "uint8")
    jpeg, png = encode(noise, "JPEG"), encode(noise)
    return [
        ("x0.jpg", jpeg[: len(jpeg) // 2]),
        ("x0.txt", b"a truncated jpeg"),
        ("x1.jpg", b"garbage"),
        ("x1.txt", b"no image at all"),
        ("x2.jpg", jpeg),
        ("x3.txt", b"no image"),
        ("x4.jpg", jpeg),
        ("x4.txt", b" \n"),
        ("x5.png", png[: len(png) // 2]),
        ("x5.txt", b"a truncated png"),
        ("x6.jpg", b""),
        ("x6.txt", b"an image of no bytes"),
        ("x7.jpg", jpeg),
        ("x7.txt", b"fine"),
    ]


EXPECTED = {
    "the image does not decode": 4,
    "no caption": 1,
    "no image": 1,
    "empty caption": 1,
}


@pytest.mark.parametrize("training", [False, True])
def test_broken_samples_are_skipped_and_counted(write_pairs, broken_files, training):
    shard = write_pairs("x.tar", 0, 30, broken_files)
    dataset = make(shard, training, batch_size=5, drop_remainder=False)
    # Every pass counts from zero, warns once, and sums up.
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"x\d.* of the shard .*x\.tar") as caught:
            received = keys(dataset)
        assert len(caught) == 2, [str(warning.message) for warning in caught]
        summary = (
            "skipped 7 of 38 samples: empty caption: 1, no caption: 1, no image: 1"
        )
        assert summary in str(caught[1].message)
        # In training an image that does not decode is replaced by its neighbour.
        assert len(received) == 31 + training * EXPECTED["the image does not decode"]
        assert sorted({*received}) == [*(f"{index:04}" for index in range(30)), "x7"]
        assert dataset.skipped.by_reason == EXPECTED
        assert dataset.skipped.count == 7
        reasons = {key: (name, reason) for name, key, reason in dataset.skipped.samples}
        assert sorted(reasons) == [f"x{index}" for index in range(7)]
        assert reasons["x2"] == (str(shard), "no caption")
        assert reasons["x6"] == (str(shard), "the image does not decode")
    assert "count=7" in repr(dataset.skipped)
    assert "no caption: 1" in repr(dataset.skipped)


def test_a_pass_that_was_given_up_does_not_count():
    skipped = SkippedSamples()
    given_up, current = skipped.start_pass(), skipped.start_pass()
    given_up.report("x.tar", "1", "no caption")
    assert skipped.count == 0
    with pytest.warns(UserWarning, match="no image"):
        current.report("x.tar", "2", "no image")
    assert skipped.samples == [("x.tar", "2", "no image")]
    skipped.start_pass()
    assert (skipped.count, skipped.samples) == (0, [])


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_passes_at_the_same_time_are_not_counted_together(write_pairs, broken_files):
    dataset = make(write_pairs("x.tar", 0, 30, broken_files), batch_size=2)
    given_up = iter(dataset)
    next(given_up)
    assert len(keys(dataset)) == 31
    list(given_up)
    assert dataset.skipped.count == 7


def test_a_group_in_which_nothing_decodes_is_skipped(write_pairs):
    broken = []
    for index in range(40):
        broken += [(f"x{index}.jpg", b"garbage"), (f"x{index}.txt", b"text")]
    dataset = make(write_pairs("x.tar", 0, 3, broken))
    with pytest.warns(UserWarning, match="skipped"):
        assert keys(dataset) == ["0000", "0001", "0002"]
    assert dataset.skipped.count == 40


@pytest.mark.parametrize("pair", [0, 2, 4])
def test_raising_names_the_shard_and_the_key(write_pairs, broken_files, pair):
    starts = [0, 2, 4, 5, 6, 8]
    broken = broken_files[starts[pair] : starts[pair + 1]]
    shard = write_pairs("x.tar", 0, 20, broken)
    key = broken[0][0].partition(".")[0]
    with pytest.raises(Exception, match=rf"'{key}' of the shard {shard}"):
        list(make(shard, on_error="raise"))


def test_a_truncated_shard_gives_what_it_holds_and_is_counted(shards):
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[: len(content) // 2])
    dataset = make(shards)
    with pytest.warns(UserWarning, match=rf"{shards[0]} is damaged"):
        received = keys(dataset)
    count = len(received) - 50
    assert 20 < count < 50
    assert received == [f"{i:04}" for i in [*range(count), *range(70, 120)]]
    assert dataset.skipped.by_reason["damaged shard"] == 1
    with pytest.raises(Exception, match=rf"{shards[0]} is damaged.*'{count:04}'"):
        list(make(shards, on_error="raise"))


def test_a_source_without_pairs_is_refused_by_name(write_tar, write_pairs, tmp_path):
    empty = write_tar("empty.tar", [])
    with pytest.raises(ValueError, match=r"`source`.*empty\.tar"):
        make(empty)
    other = write_tar("other.tar", [("1.bmp", b"x"), ("1.json", b"{}")])
    with pytest.raises(ValueError, match=r"'txt'.*\['bmp', 'json'\].*other\.tar"):
        make(other)
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"broken\.tar is damaged"):
        make(tmp_path / "broken.tar")
    # One empty shard among others does no harm.
    assert len(keys(make([empty, write_pairs("full.tar", 0, 3)]))) == 3


def test_other_extensions_of_images_and_captions_can_be_named(write_tar, encode):
    image = encode(np.zeros((8, 8, 3), "uint8"))
    files = [("1.mask.png", image), ("1.caption", b"yes"), ("1.txt", b"no")]
    shard = write_tar("x.tar", files)
    batch = batches(make(shard, image_keys="mask.png", caption_key="caption"))[0]
    assert batch["captions"].tolist() == [b"yes"]


def test_channels_first_and_sizes_that_are_not_square(shards):
    batch = next(iter(make(shards, data_format="channels_first", image_size=(8, 20))))
    assert batch["images"].shape == (8, 3, 8, 20)
    np.testing.assert_array_equal(batch["images"][:, 0, 0, 0], range(8))


def test_batches_for_fit_hold_images_and_tokens_alone(shards):
    dataset = image_text_dataset(shards, TOKENIZER, 16, 8, training=True)
    assert sorted(dataset.element_spec) == ["images", "token_ids"]


def test_photographs_are_turned_upright(write_tar, encode):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    array = np.zeros((16, 16, 3), "uint8")
    array[:8] = 255
    content = encode(array, "JPEG", exif=exif)
    image = batches(make(write_tar("x.tar", [("1.jpg", content), ("1.txt", b"t")])))
    # Its upper half is its right half, held upright.
    columns = image[0]["images"][0].mean(axis=(0, 2))
    assert columns[2] < 10
    assert columns[13] > 245


def test_fewer_pairs_than_a_full_batch_are_an_error(write_pairs):
    shard = write_pairs("few.tar", 0, 5)
    with pytest.raises(ValueError, match=r"`batch_size`.*batch_size=6, 5 pairs"):
        make(shard, True, batch_size=6)
    assert len(batches(make(shard, True, batch_size=5))) == 1
    assert len(batches(make(shard, batch_size=6))) == 1


def test_wrong_arguments_are_named(shards):
    for name, value in {
        "on_error": "ignore",
        "crop_scale": (0.5, 1.5),
        "background": "black",
        "image_size": 0,
        "data_format": "NHWC",
    }.items():
        with pytest.raises(ValueError, match=rf"`{name}`.*Received"):
            make(shards, **{name: value})


@pytest.mark.slow
def test_tokenizers_need_no_tensorflow_and_do_not_import_open_clip(shards):
    code = f"""
import sys
sys.modules["tensorflow"] = None
from keras_cluster_mask import data
tokenizer = data.CLIPTokenizer.train(["a cat"])
assert tokenizer("a cat").shape == (1, 32)
assert data.CLIPTokenizer.from_open_clip()("a cat").shape == (1, 77)
assert "open_clip" not in sys.modules
assert data.list_shards({str(shards[0])!r})
try:
    data.image_text_dataset({str(shards[0])!r}, tokenizer, 8, 2, training=True)
except ImportError as error:
    assert "needs TensorFlow" in str(error)
else:
    raise AssertionError
"""
    backend = "torch" if keras.backend.backend() == "torch" else "jax"
    code = f"import os; os.environ['KERAS_BACKEND'] = {backend!r}\n{code}"
    subprocess.run([sys.executable, "-c", code], check=True)
