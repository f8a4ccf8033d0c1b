"""What the model is given is checked before it starts."""

import numpy as np
import pytest

from keras_cluster_mask.training.input_rules import InputRules
from keras_cluster_mask.training.training_data import reader_of
from tests.helpers import FAST, VOCABULARY, random_pairs, small_model

pytestmark = pytest.mark.any_backend

RULES = InputRules(vocabulary_size=VOCABULARY)


def check_data(data, rules):
    return reader_of(data, rules).for_keras()


def dataset_of(pairs, batch_size=4):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(pairs).batch(batch_size)


def with_id(value, dtype="int32"):
    pairs = random_pairs(8)
    ids = pairs["token_ids"].astype(dtype)
    ids[5, 3] = value
    return {**pairs, "token_ids": ids}


def test_strings_are_left_out_since_no_model_takes_them():
    tf = pytest.importorskip("tensorflow")
    pairs = random_pairs(4)
    named = {**pairs, "sample_id": np.array(list("abcd")), "label": np.arange(4)}
    expected = {"images", "token_ids", "label"}
    assert {*check_data(named, RULES)} == expected
    found = check_data({**named, "sample_id": list("abcd")}, RULES)
    assert {*found} == expected
    dataset = tf.data.Dataset.from_tensor_slices(named).batch(2)
    assert {*check_data(dataset, RULES).element_spec} == expected
    ((batch,),) = check_data((x for x in [named]), RULES)
    assert {*batch} == expected


def test_good_arrays_come_back_as_they_are():
    pairs = random_pairs(8)
    for name, values in check_data(pairs, RULES).items():
        assert values is pairs[name]
    # The largest and the smallest id there are.
    for value in (0, VOCABULARY - 1):
        check_data(with_id(value), RULES)


@pytest.mark.parametrize("value", [VOCABULARY, -1])
def test_ids_beyond_the_vocabulary_are_an_error_in_arrays(value):
    with pytest.raises(ValueError, match=r"vocabulary.*\[0, 30\).*Received:"):
        check_data(with_id(value), RULES)


@pytest.mark.parametrize("value", [VOCABULARY, -1])
def test_ids_beyond_the_vocabulary_are_an_error_in_a_dataset(value):
    checked = check_data(dataset_of(with_id(value)), RULES)
    with pytest.raises(Exception, match=r"vocabulary, \[0, 30\)"):
        list(checked)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint16"])
def test_a_checked_dataset_yields_the_same_batches(dtype):
    pairs = with_id(7, dtype)
    # A vocabulary that fits no byte, and is more than most signed shorts hold.
    batches = list(check_data(dataset_of(pairs), InputRules(vocabulary_size=49408)))
    ids = np.concatenate([batch["token_ids"].numpy() for batch in batches])
    np.testing.assert_array_equal(ids, pairs["token_ids"])
    assert ids.dtype == dtype
    images = np.concatenate([batch["images"].numpy() for batch in batches])
    np.testing.assert_array_equal(images, pairs["images"])


def test_zeros_that_are_no_padding_are_an_error_without_a_mask():
    pairs = random_pairs(8)
    pairs["token_ids"] = 1 + np.arange(8 * 6).reshape(8, 6) % 9
    pairs["token_ids"][:, 4:] = 0
    rules = InputRules(zeros_are_padding=True)
    assert len(list(check_data(dataset_of(pairs), rules))) == 2
    for column in (0, 2):
        wrong = {**pairs, "token_ids": pairs["token_ids"].copy()}
        wrong["token_ids"][5, column] = 0
        message = r"`padding_mask` must be in the batch.*Received: 1 such rows"
        with pytest.raises(ValueError, match=f"{message}, the first of them row 5"):
            check_data(wrong, rules)
        with pytest.raises(Exception, match=message):
            list(check_data(dataset_of(wrong), rules))
        masked = {**wrong, "padding_mask": np.ones((8, 6), "int32")}
        assert {*check_data(masked, rules)} == {*masked}
        assert len(list(check_data(dataset_of(masked), rules))) == 2


def test_without_a_known_vocabulary_ids_pass():
    check_data(with_id(10_000), InputRules())
    list(check_data(dataset_of(with_id(10_000)), InputRules()))


@pytest.mark.parametrize("key", ["images", "token_ids"])
def test_a_missing_key_is_named(key):
    pairs = random_pairs(4)
    pairs["something"] = pairs.pop(key)
    for data in (pairs, dataset_of(pairs)):
        with pytest.raises(ValueError, match=rf"missing: .'{key}'.*Received:.*somethi"):
            check_data(data, RULES)


def test_lists_of_numbers_are_arrays_everywhere():
    pairs = random_pairs(8)
    lists = {"images": pairs["images"], "token_ids": pairs["token_ids"].tolist()}
    weights = np.linspace(0, 1, 8).tolist()
    model = small_model()
    model.compile("sgd", **FAST)
    fit = dict(batch_size=4, sample_weight=weights, validation_data=lists, verbose=0)
    assert len(model.fit(lists, **fit).history["val_loss"]) == 1
    found, expected = (
        (model.evaluate(x, sample_weight=w, verbose=0), model.predict(x, verbose=0))
        for x, w in ((lists, weights), (pairs, np.asarray(weights)))
    )
    assert found[0] == expected[0]
    for name, value in expected[1].items():
        np.testing.assert_array_equal(found[1][name], value)


def test_weights_under_another_name_are_refused():
    pairs = {**random_pairs(4), "sample_weights": np.zeros(4)}
    tf = pytest.importorskip("tensorflow")
    for data in (pairs, tf.data.Dataset.from_tensor_slices(pairs).batch(2)):
        with pytest.raises(ValueError, match=r"as 'sample_weight'.*Received: .*_wei"):
            check_data(data, RULES)


def test_lists_of_strings_of_any_lengths_are_no_numbers():
    captions = [["a"], ["b", "c"]]
    pairs = {**random_pairs(2), "captions": captions}
    assert set(check_data(pairs, RULES)) == {"images", "token_ids"}


def test_lists_in_batches_of_a_generator_become_arrays():
    pairs = random_pairs(2)
    lists = {name: values.tolist() for name, values in pairs.items()}
    ((batch,),) = check_data((x for x in [lists]), RULES)
    for name, values in pairs.items():
        np.testing.assert_array_equal(batch[name], values)
