"""Arrays are trained on in full batches, in an order that a run can resume in."""

import contextlib
import itertools
import warnings

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.training.training_data import ArrayBatches
from tests.helpers import FAST, TokenLog, image_mlp, random_pairs, text_bag


def numbered(count):
    pairs = random_pairs(count)
    pairs["token_ids"][:] = np.arange(count)[:, None]
    return pairs


def rows_of(batches, count):
    """The first ids of some batches, `(count, batch_size)`."""
    batches = itertools.islice(iter(batches), count)
    return np.array([batch["token_ids"][:, 0] for batch in batches])


def batches_of(count, batch_size, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ArrayBatches(numbered(count), batch_size, **options)


@pytest.mark.any_backend
def test_each_epoch_has_each_pair_once_in_another_order():
    rows = rows_of(batches_of(12, 4), 6).reshape(2, 12)
    for epoch in rows:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    assert np.any(rows[0] != rows[1])
    assert np.any(rows[0] != np.arange(12))


@pytest.mark.any_backend
def test_without_a_shuffle_the_order_is_that_of_the_arrays():
    rows = rows_of(batches_of(10, 4, shuffle=False), 4)
    np.testing.assert_array_equal(rows.reshape(2, 8), [np.arange(8)] * 2)


@pytest.mark.any_backend
def test_other_pairs_are_left_out_in_each_epoch_with_one_warning():
    with pytest.warns(UserWarning, match="3 of 11 pairs fill no batch of 4") as found:
        batches = ArrayBatches(numbered(11), 4)
    assert len(found) == 1
    rows = rows_of(batches, 2 * 20).reshape(20, 8)
    assert {len({*epoch}) for epoch in rows} == {8}
    assert {*rows.ravel()} == {*range(11)}


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
        found.append(rows_of(batches_of(20, 4), 5))
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])


@pytest.mark.any_backend
def test_a_pass_starts_with_any_batch():
    batches = batches_of(11, 4)
    expected = rows_of(batches, 7)
    for start in (1, 2, 5):
        batches.start = start
        np.testing.assert_array_equal(rows_of(batches, 7 - start), expected[start:])


@pytest.mark.any_backend
def test_an_order_is_drawn_once_an_epoch(monkeypatch):
    batches = batches_of(40, 4)
    drawn = []
    make = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda x: drawn.append(x) or make(x))
    rows_of(batches, 20)
    assert len(drawn) == 2


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("count", "batch_size", "options", "message"),
    [
        (1, 4, {}, "two pairs.*Received: batch_size=4, arrays of 1 pairs"),
        (8, 1, {}, "two pairs.*Received: batch_size=1, arrays of 8 pairs"),
        (8, 4, {"shuffle": "batch"}, "`shuffle` must.*Received: shuffle='batch'"),
    ],
)
def test_what_makes_no_batches_is_refused(count, batch_size, options, message):
    with pytest.raises(ValueError, match=message):
        ArrayBatches(numbered(count), batch_size, **options)


# === In fit ===


def logged(rows, **options):
    """A model that remembers the first token of each row that it is trained on."""
    log, ids = TokenLog(16, rows), keras.Input((6,), dtype="int32")
    text_encoder = keras.Model(ids, text_bag()(log(ids)))
    model = kcm.ContrastiveModel(image_mlp(), text_encoder, **options)
    model.compile(keras.optimizers.SGD(0.0), **FAST)
    return model, log


def test_fit_trains_on_full_batches_alone():
    model, log = logged(rows=4)
    with pytest.warns(UserWarning, match="2 of 10 pairs"):
        model.fit(numbered(10), batch_size=4, epochs=3, verbose=0)
    seen = log.seen_tokens().reshape(3, 8)
    assert {len({*epoch}) for epoch in seen} == {8}
    assert np.any(seen[0] != seen[1])
    assert int(model.optimizer.iterations) == 6


def test_fit_on_less_than_a_batch_trains_on_what_there_is():
    model, log = logged(rows=6)
    model.fit(numbered(6), epochs=2, verbose=0)
    assert [{*epoch} for epoch in log.seen_tokens()] == [{*range(6)}] * 2


@pytest.mark.any_backend
def test_a_micro_batch_that_does_not_divide_fails_before_the_first_step():
    model, _ = logged(rows=6, micro_batch_size=4)
    begun = []
    callback = keras.callbacks.LambdaCallback(on_train_begin=begun.append)
    with pytest.raises(ValueError, match=r"`micro_batch_size` must.*a batch of 6"):
        model.fit(numbered(6), batch_size=6, verbose=0, callbacks=[callback])
    assert not begun


def test_a_run_that_was_stopped_resumes_in_its_shuffled_order(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def fit(*callbacks):
        model, log = logged(rows=4)
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(
                numbered(16),
                batch_size=4,
                epochs=2,
                verbose=0,
                resume_from=tmp_path,
                callbacks=[kcm.callbacks.Checkpoint(tmp_path), *callbacks],
            )
        return log.seen_tokens().ravel()

    keras.utils.set_random_seed(5)
    expected = rows_of(ArrayBatches(numbered(16), 4), 8).ravel()
    keras.utils.set_random_seed(5)
    np.testing.assert_array_equal(fit(Stop()), expected[:16])
    # What was seen is part of the model's state.
    keras.utils.set_random_seed(6)
    np.testing.assert_array_equal(fit(), expected)
    assert np.any(expected[:16] != expected[16:])
