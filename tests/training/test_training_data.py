"""Data of every kind is checked before it trains, and arrays can be resumed."""

import collections
import contextlib
import io
import itertools

import keras
import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from keras_cluster_mask.batches import as_array
from keras_cluster_mask.training import arrays, training_data
from keras_cluster_mask.training.arrays import ArrayBatches
from keras_cluster_mask.training.input_rules import InputRules, as_dictionary
from keras_cluster_mask.training.training_data import TrainingData
from tests.helpers import (
    FAST,
    VOCABULARY,
    Batches,
    compiled_model,
    model_with_log,
    number_as_token,
    random_pairs,
    small_model,
    split,
    stream,
)
from tests.training.training_run import StopAfter

BACKEND = keras.backend.backend()

# === The kinds of data ===


def generator(*batches):
    yield from batches


def rows(pairs):
    return [{name: x[0] for name, x in row.items()} for row in split(pairs, 1)]


def tf_dataset(data, drop_remainder=True):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(data).batch(4, drop_remainder)


def grain_dataset(pairs):
    return pytest.importorskip("grain").MapDataset.source(rows(pairs))


def loader(pairs):
    if BACKEND != "torch":
        pytest.skip("Keras takes dictionaries from torch's loaders on torch alone.")
    from torch.utils.data import DataLoader

    return DataLoader(rows(pairs), batch_size=4)


# Each makes data of two batches from eight pairs.
KINDS = {
    "arrays": lambda pairs: pairs,
    "tf.data": tf_dataset,
    "tf.data of tuples": lambda pairs: tf_dataset((pairs,)),
    "grain": lambda pairs: grain_dataset(pairs).batch(4),
    "PyDataset": lambda pairs: Batches(split(pairs)),
    "DataLoader": loader,
    "generator": lambda pairs: ((batch,) for batch in split(pairs)),
    "generator of dictionaries": lambda pairs: generator(*split(pairs)),
}

every_kind = pytest.mark.parametrize("kind", list(KINDS))


def read(data, **rules):
    """The batches of arrays, a stream or a `tf.data.Dataset` that Keras reads."""
    rules = InputRules(vocabulary_size=VOCABULARY, training=True, **rules)
    data = TrainingData(as_dictionary(data), rules, 4, shuffle=False).start_at(0)
    batches = itertools.islice(data, 2)
    return [batch[0] if isinstance(batch, tuple) else batch for batch in batches]


# What is no array of numbers.
OTHERS = [
    list("abcdefgh"),
    [["a"], ["b", "c"], *["d"] * 6],
    "all from one shard",
    {"url": list("abcdefgh"), "width": np.arange(8)},
    np.array(["2024-01-01"] * 8, "datetime64[D]"),
]


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("kind", "other"),
    [*(("arrays", x) for x in OTHERS), *((kind, OTHERS[0]) for kind in KINDS)],
)
def test_entries_without_numbers_are_left_out_or_refused(kind, other):
    # A wide type, and an entry that no model takes.
    pairs = {**random_pairs(8), "label": np.arange(8)}
    pairs["token_ids"] = pairs["token_ids"].astype("int64")
    data = KINDS[kind]({**pairs, "other": other})
    if kind not in ("arrays", "tf.data", "tf.data of tuples"):
        with pytest.raises(ValueError, match=r"must be an array.*\['other'\], which"):
            read(data)
        return
    message = r"do not reach the model. Received: \['other'\]"
    with pytest.warns(UserWarning, match=message) as warned:
        found = read(data)
    assert len(warned) == 1
    for batch, expected in zip(found, split(pairs), strict=True):
        assert {*batch} == {*expected}
        for name, values in expected.items():
            np.testing.assert_array_equal(as_array(batch[name]), values)
            assert as_array(batch[name]).dtype == values.dtype


@every_kind
def test_a_bad_first_batch_of_any_kind_is_refused(kind):
    pairs = random_pairs(8)
    ids, weights = pairs["token_ids"].copy(), np.ones(8, "float32")
    ids[2, 3], weights[3] = VOCABULARY, np.nan
    floats = np.random.default_rng(0).random((8, 16, 16, 3)).astype("float32")
    for entries, message in (
        ({"token_ids": ids}, r"vocabulary, \[0, 30\)"),
        ({"sample_weight": weights}, "`sample_weight` must"),
        ({"sample_weights": weights}, "must have the key 'sample_weight'"),
        ({"images": floats}, "`images` must"),
        ({"images": pairs["images"].astype("int32")}, "`images` must"),
    ):
        with pytest.raises(Exception, match=message):
            read(KINDS[kind]({**pairs, **entries}), pixel_range=(-2.0, 2.0))


@every_kind
def test_data_of_any_kind_trains_on_each_batch_and_is_checked_in_evaluation(
    kind, model
):
    pairs = random_pairs(8)
    data = KINDS[kind](pairs)
    # The batch that is checked is trained on, too.
    model.fit(data, batch_size=4, verbose=0)
    assert int(model.optimizer.iterations) == 2
    if isinstance(data, Batches):
        assert data.begun > 0
    pairs["images"] = pairs["images"] / np.float32(255)
    with pytest.raises(Exception, match="`images` must be uint8"):
        model.evaluate(KINDS[kind](pairs), verbose=0)


@pytest.mark.parametrize("steps", [None, 2])
def test_a_tf_dataset_gives_the_losses_of_its_arrays(steps):
    def losses(train, **options):
        keras.utils.set_random_seed(1)
        return compiled_model().fit(train, epochs=2, verbose=0, **options).history

    pairs = random_pairs(8)
    data = tf_dataset(pairs) if steps is None else tf_dataset(pairs).repeat()
    expected = losses(pairs, batch_size=4, shuffle=False)
    found = losses(data, steps_per_epoch=steps)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.one_case
@every_kind
def test_an_evaluation_is_the_mean_over_all_pairs(kind, model):
    pairs, expected = random_pairs(9), []
    for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
        model.reset_metrics()
        part = {name: values[rows] for name, values in pairs.items()}
        expected.append(np.array(model.test_on_batch(part)))
    options = {"batch_size": 4} if kind == "arrays" else {}
    data = KINDS[kind](pairs)
    if kind.startswith("tf.data"):
        data = tf_dataset((pairs,) if "tuples" in kind else pairs, False)
    found = model.evaluate(data, verbose=0, **options)
    mean = np.average(expected, axis=0, weights=[4, 4, 1])
    # Loss and accuracy; the temperature is the same.
    assert found == pytest.approx(mean, rel=1e-5)


@pytest.mark.any_backend
def test_grain_reads_a_source_of_files(write_pairs, model):
    grain = pytest.importorskip("grain")

    def pair(item):
        image = np.asarray(Image.open(io.BytesIO(item["png"])).resize((16, 16)))
        ids = number_as_token([item["txt"].decode()])[0]
        return {"images": image, "token_ids": ids}

    part, _ = kcm.data.split(write_pairs("a.tar", 0, 20), test=0.4, by="key")
    data = grain.MapDataset.source(part).map(pair).batch(4, drop_remainder=True)
    model.fit(data.shuffle(seed=1), verbose=0)
    assert int(model.optimizer.iterations) == len(part) // 4


KNOWN = r"`x` and .* must.*pass `\(batch for batch in data\)` for one.*Received:"
DICTIONARY = r"must be a dictionary.*Received: .*"


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda images: None, KNOWN),
        (lambda images: [random_pairs(4)] * 2, KNOWN),
        (lambda images: images, KNOWN),
        (lambda images: tf_dataset((images, images)), DICTIONARY + "tuple"),
        (lambda images: Batches([images]), DICTIONARY + "tuple"),
    ],
)
def test_what_is_no_data_of_dictionaries_is_refused(make, message, model):
    with pytest.raises(ValueError, match=message):
        model.fit(make(random_pairs(4)["images"]), verbose=0)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        (np.arange(4), None, r"`y` must be None.*Received: y of type"),
        (None, -np.ones(4, "float32"), r"`sample_weight` must.*Received:"),
    ],
)
def test_labels_and_weights_in_tuples_are_checked(labels, weights, message):
    batch = (random_pairs(4), labels, weights)
    dataset = tf_dataset(batch[0]).map(lambda x: (x, labels, weights))
    for data in (batch, generator([*batch]), dataset):
        with pytest.raises(Exception, match=message):
            read(data)


@pytest.mark.parametrize("kind", ["generator", "tf.data of tuples"])
def test_weights_in_tuples_are_those_of_the_batch(kind, model):
    pairs, weights = random_pairs(8), np.linspace(0, 2, 8, dtype="float32")
    expected = model.evaluate({**pairs, "sample_weight": weights}, verbose=0)
    data = generator((pairs, None, weights))
    if kind != "generator":
        data = tf_dataset((pairs, weights)).unbatch().batch(8)
        data = data.map(lambda pairs, weights: (pairs, None, weights))
    assert model.evaluate(data, verbose=0) == pytest.approx(expected, rel=1e-6)
    assert model.evaluate(pairs, verbose=0) != pytest.approx(expected, rel=1e-6)
    message = (
        r"`sample_weight` may be passed with arrays.*Received: sample_weight of type"
    )
    for data in (Batches([pairs]), {**pairs, "sample_weight": weights}):
        with pytest.raises(ValueError, match=message):
            as_dictionary(data, sample_weight=weights)


@pytest.mark.any_backend
def test_a_dataset_of_tensorflow_that_never_ends_needs_a_number_of_steps(
    write_pairs, model
):
    pytest.importorskip("tensorflow")
    data = stream(write_pairs("a.tar", 0, 8)).as_dataset()
    with pytest.raises(ValueError, match=r"`steps_per_epoch` must be given"):
        model.fit(data, verbose=0)
    with pytest.raises(ValueError, match=r"must be finite: .*Received: an endless"):
        model.evaluate(data, verbose=0)
    model.fit(data, steps_per_epoch=2, verbose=0)


def test_the_captions_of_an_image_text_dataset_are_left_out_without_a_warning(
    write_pairs, recwarn
):
    shard = write_pairs("a.tar", 0, 8)
    data = stream(shard, include_captions=True)
    assert [{*batch} for batch in read(data)] == [{"images", "token_ids"}] * 2
    assert not recwarn.list


@pytest.mark.any_backend
def test_lists_of_numbers_are_arrays(model):
    pairs, weights = random_pairs(8), np.linspace(0, 1, 8)
    lists = {**pairs, "token_ids": pairs["token_ids"].tolist()}
    found = model.evaluate(lists, sample_weight=weights.tolist(), verbose=0)
    assert found == model.evaluate(pairs, sample_weight=weights, verbose=0)
    found = as_array(model.encode_text(lists["token_ids"]))
    np.testing.assert_array_equal(
        found, as_array(model.encode_text(pairs["token_ids"]))
    )


@pytest.mark.any_backend
def test_arrays_are_checked_once_and_steps_check_nothing(monkeypatch, model):
    entered = collections.Counter()
    for name in ("check_keys", "check_values"):
        method = getattr(InputRules, name)
        monkeypatch.setattr(
            InputRules,
            name,
            lambda *args, n=name, m=method: entered.update([n]) or m(*args),
        )
    model.fit(random_pairs(8), batch_size=2, epochs=2, verbose=0)
    assert entered == {"check_keys": 1, "check_values": 1}


@pytest.mark.any_backend
def test_a_stream_that_differs_between_processes_is_refused(monkeypatch):
    def place(training):
        return 0, 2

    monkeypatch.setattr(training_data, "process_index_and_count", place)
    monkeypatch.setattr(training_data, "all_gather_object", lambda x: [x, x])
    TrainingData(random_pairs(8), InputRules(), 4)
    monkeypatch.setattr(training_data, "all_gather_object", lambda x: [x, x + 1])
    with pytest.raises(ValueError, match=r"`x` must be the same.*Received here: .*8"):
        TrainingData(random_pairs(8), InputRules(), 4)


@pytest.mark.any_backend
def test_arrays_are_not_evaluated_by_several_processes_that_share_batches(
    model, monkeypatch
):
    def place(training):
        return 0, 1 if training else 2

    monkeypatch.setattr(training_data, "process_index_and_count", place)
    pairs = random_pairs(4)
    with pytest.raises(ValueError, match=r"by several JAX processes.*, 2 processes"):
        model.fit(pairs, validation_data=pairs, verbose=0)


# === Full batches of arrays ===


def numbered(count):
    pairs = random_pairs(count)
    pairs["token_ids"][:] = np.arange(count)[:, None]
    return pairs


def rows_of(batches, count):
    """The first ids of some batches, `(count, batch_size)`."""
    batches = itertools.islice(iter(batches), count)
    return np.array([batch["token_ids"][:, 0] for batch in batches])


@pytest.mark.any_backend
@pytest.mark.parametrize("count", [12, 11])
def test_each_epoch_has_each_pair_once_in_another_order(count):
    batches = ArrayBatches(numbered(count), 4)
    assert len(batches) == count // 4
    # Pairs that fill no batch are in the first batch of the next epoch.
    rows = rows_of(batches, 2 * count).reshape(8, count)
    for epoch in rows:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    assert len({tuple(epoch) for epoch in rows}) == 8
    assert np.any(rows[0] != np.arange(count))


@pytest.mark.any_backend
def test_without_a_shuffle_the_order_is_that_of_the_arrays():
    rows = rows_of(ArrayBatches(numbered(10), 4, shuffle=False), 5)
    np.testing.assert_array_equal(rows.reshape(2, 10), [np.arange(10)] * 2)


@pytest.mark.any_backend
def test_fewer_pairs_than_a_batch_are_one_batch():
    batches = ArrayBatches(numbered(5), 32)
    assert len(batches) == 1
    assert batches.element_spec["images"].shape == (5, 16, 16, 3)
    assert {*rows_of(batches, 1)[0]} == {*range(5)}


@pytest.mark.any_backend
def test_the_order_follows_the_seed_of_keras():
    found = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        found.append(rows_of(ArrayBatches(numbered(20), 4), 5))
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])


@pytest.mark.any_backend
def test_processes_share_the_batches_of_one(monkeypatch):
    def batches_in(*place):
        monkeypatch.setattr(arrays, "process_index_and_count", lambda training: place)
        keras.utils.set_random_seed(1)
        return ArrayBatches(numbered(19), 8)

    expected = rows_of(batches_in(0, 1), 5)
    parts = [batches_in(rank, 4) for rank in range(4)]
    assert [x.element_spec["token_ids"].shape[0] for x in parts] == [2] * 4
    found = [rows_of(part, 5) for part in parts]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
    with pytest.raises(ValueError, match=r"`batch_size` must be a m.*=9, .*4 pro"):
        ArrayBatches(numbered(19), 9)


@pytest.mark.any_backend
def test_a_pass_starts_with_any_batch():
    batches = ArrayBatches(numbered(11), 4)
    expected = rows_of(batches, 7)
    for start in (1, 2, 5):
        batches.start = start
        np.testing.assert_array_equal(rows_of(batches, 7 - start), expected[start:])


# === In fit ===


@pytest.mark.any_backend
def test_a_micro_batch_that_does_not_divide_fails_before_the_first_step():
    model = small_model(micro_batch_size=4)
    model.compile("sgd", **FAST)
    with pytest.raises(ValueError, match=r"`micro_batch_size` must.*a batch of 6"):
        model.fit(numbered(6), verbose=0)
    # Keras builds it before the first step.
    assert not model.optimizer.built
    # Evaluation does not need micro-batches.
    model.evaluate(numbered(6), verbose=0)


@pytest.mark.any_backend
def test_a_run_that_was_stopped_resumes_in_its_shuffled_order(tmp_path):
    def fit(*callbacks):
        model, log = model_with_log(steps=16)
        model.compile(keras.optimizers.SGD(0.0), **FAST)
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(
                numbered(18),
                batch_size=4,
                epochs=2,
                verbose=0,
                resume_from=tmp_path,
                callbacks=[kcm.callbacks.Checkpoint(tmp_path), *callbacks],
            )
        return log.seen_tokens().ravel()

    keras.utils.set_random_seed(5)
    expected = rows_of(ArrayBatches(numbered(18), 4), 8).ravel()
    keras.utils.set_random_seed(5)
    np.testing.assert_array_equal(fit(StopAfter(5)), expected[:20])
    # What was seen is part of the model's state.
    keras.utils.set_random_seed(6)
    np.testing.assert_array_equal(fit(), expected)
    assert np.any(expected[:16] != expected[16:])
