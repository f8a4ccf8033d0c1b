"""with_context_length: the same text encoder for texts of another length."""

import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.models import with_context_length
from tests.helpers import (
    CONTEXT,
    FAST,
    as_trained,
    assert_same_values,
    image_mlp,
    random_pairs,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    values,
)

MAKERS = {"clip": tiny_clip, "metaclip": tiny_metaclip, "siglip": tiny_siglip}
each_model = pytest.mark.parametrize("kind", list(MAKERS))


def made(kind):
    return as_trained(MAKERS[kind]())


def tables(*models):
    """The weights that differ in shape, of each model."""
    pairs = zip(*(model.weights for model in models))
    differ = [pair for pair in pairs if len({tuple(x.shape) for x in pair}) > 1]
    # SigLIP has the numbers of the rows as well.
    return [pair for pair in differ if "int" not in pair[0].dtype]


@pytest.mark.any_backend
@each_model
@pytest.mark.parametrize("length", [3, CONTEXT, 9, 13])
def test_positions_are_interpolated_as_torch_does(kind, length):
    torch = pytest.importorskip("torch")
    model = made(kind)
    copy = with_context_length(model, length)
    assert copy.text_encoder.max_sequence_length == length
    found = tables(model, copy)
    assert len(found) == (length != CONTEXT)
    for old, new in found:
        old, new = values([old, new])
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(old.T[None]), size=length, mode="linear"
        )
        np.testing.assert_allclose(new, expected[0].numpy().T, atol=1e-5)


@pytest.mark.any_backend
@each_model
def test_all_other_weights_are_copied_and_the_model_is_left_as_it_is(kind):
    model = made(kind)
    before = values(model.weights)
    copy = with_context_length(model, 9)
    changed = {id(pair[1]) for pair in tables(model, copy)}
    for old, new in zip(model.weights, copy.weights):
        assert old is not new
        if id(new) not in changed and tuple(old.shape) == tuple(new.shape):
            np.testing.assert_array_equal(*values([old, new]))
    same = with_context_length(model, CONTEXT)
    assert_same_values(same.weights, before)
    assert_same_values(model.weights, before)


@pytest.mark.any_backend
@each_model
def test_a_text_encoder_alone_is_taken_too(kind):
    encoder = made(kind).text_encoder
    copy = with_context_length(encoder, 9)
    assert type(copy) is type(encoder)
    features = ops.convert_to_numpy(copy(np.ones((2, 9), "int32")))
    assert len(features) == 2
    assert np.isfinite(features).all()


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "length", "name"),
    [
        (image_mlp, 9, "model"),
        *((tiny_clip, length, "length") for length in (2, 9.0, True, None)),
    ],
)
def test_what_cannot_be_done_is_refused(make, length, name):
    with pytest.raises(ValueError, match=rf"`{name}` must.*Received: {name}="):
        with_context_length(make(), length)


def test_training_a_copy_leaves_the_model_as_it_was():
    backbone = tiny_clip()
    before = values(backbone.weights)
    model = kcm.ContrastiveModel.from_backbone(with_context_length(backbone, 5))
    model.compile("sgd", **FAST)
    pairs = random_pairs(4)
    pairs["token_ids"] = pairs["token_ids"][:, :5]
    model.fit(pairs, batch_size=4, verbose=0)
    # On JAX, arrays of the step would have been deleted.
    assert_same_values(backbone.weights, before)
