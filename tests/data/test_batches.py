import numpy as np
import pytest

from keras_cluster_mask.data import CLIPTokenizer, ImageTextBatches, image_text_dataset

pytestmark = pytest.mark.any_backend

TOKENIZER = CLIPTokenizer.train([f"no {i}" for i in range(200)], 600, context_length=9)
ALL = dict(include_keys=True, include_captions=True)


def make(source, training, kind=ImageTextBatches, **options):
    arguments = {**ALL, "seed": 3, "shuffle_buffer": 20, **options}
    return kind(source, TOKENIZER, 16, 8, training, **arguments)


@pytest.fixture
def shards(write_pairs):
    return [write_pairs("a.tar", 0, 70), write_pairs("b.tar", 70, 30)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, dict(data_format="channels_first")])
def test_batches_are_those_of_the_tensorflow_pipeline(shards, training, options):
    pytest.importorskip("tensorflow")
    batches = make(shards, training, **options)
    dataset = make(shards, training, image_text_dataset, **options)
    for name, spec in dataset.element_spec.items():
        assert spec.shape == batches.element_spec[name].shape
        assert spec.dtype == batches.element_spec[name].dtype
    for _ in range(2):
        ours, theirs = list(batches), list(dataset)
        assert len(ours) == len(theirs) > 10
        for one, other in zip(ours, theirs):
            assert sorted(one) == sorted(other) == sorted(batches.element_spec)
            for name in one:
                np.testing.assert_array_equal(one[name], other[name].numpy())


def test_batches_are_as_their_spec_says(shards):
    batches = make(shards, True)
    for batch in batches:
        for name, spec in batches.element_spec.items():
            assert batch[name].shape == spec.shape
            is_text = spec.dtype == "string"
            assert batch[name].dtype == ("object" if is_text else spec.dtype)


def test_the_number_of_threads_changes_nothing(shards):
    one, other = make(shards, True, num_threads=1), make(shards, True, num_threads=7)
    for first, second in zip(one, other, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def test_repeated_batches_continue_through_the_epochs(shards):
    one, other = make(shards, True), make(shards, True)
    endless = iter(one.repeat())
    assert one.repeat().element_spec == one.element_spec
    for _ in range(3):
        for batch in other:
            np.testing.assert_array_equal(next(endless)["keys"], batch["keys"])


def test_giving_up_a_pass_ends_its_threads(shards):
    import threading

    before = threading.active_count()
    for _ in range(3):
        iterator = iter(make(shards, True))
        next(iterator)
        iterator.close()
    assert threading.active_count() == before
