import keras
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.training.layers import (
    all_layers,
    omitted_settings,
    restore_settings,
    settings_of,
    state_variables,
)
from tests.helpers import reloaded


class Nested(keras.layers.Layer):
    """Layers as an attribute, in a list, in a dictionary, and twice."""

    def __init__(self):
        super().__init__()
        self.norm = keras.layers.BatchNormalization()
        self.several = [keras.layers.Dense(2), (keras.layers.Dropout(0.5, seed=1),)]
        self.named = {"norm": self.norm, "dense": keras.layers.Dense(2)}

    def build(self, shape):
        for layer in (self.norm, self.several[0], self.named["dense"]):
            layer.build(shape)

    def call(self, x):
        return self.norm(x)


def test_all_layers_are_found_once_at_any_depth():
    nested = Nested()
    inputs = keras.Input((2,))
    inner = keras.Model(inputs, nested(inputs))
    outer = keras.Sequential([inner, keras.layers.ReLU()])
    found = [*all_layers(outer)]
    assert found[0] is outer
    assert len({id(layer) for layer in found}) == len(found)
    expected = {outer, inner, nested, nested.norm, nested.several[0]}
    expected |= {nested.several[1][0], nested.named["dense"], outer.layers[-1]}
    assert {id(x) for x in expected} <= {id(x) for x in found}


def test_state_is_what_layers_update_and_no_weight_frozen_or_not():
    nested = Nested()
    nested.build((None, 2))
    names = {"moving_mean", "moving_variance"}
    assert {v.name for v in state_variables(nested)} == names
    nested.trainable = False
    assert {v.name for v in state_variables(nested)} == names


def test_frozen_parts_are_frozen_in_a_layer_of_the_same_structure():
    frozen, other = Nested(), Nested()
    for nested in (frozen, other):
        nested.build((None, 2))
    frozen.trainable = False
    # An exception within a frozen layer, and a single weight.
    frozen.named["dense"].trainable = True
    frozen.named["dense"].bias.trainable = False
    other.norm.trainable = False
    restore_settings(other, omitted_settings(frozen))
    assert [x.trainable for x in all_layers(other)] == [
        x.trainable for x in all_layers(frozen)
    ]
    found = [v.trainable for v in other.weights]
    assert found == [v.trainable for v in frozen.weights]
    assert sum(found) == 1


def test_frozen_layers_are_frozen_in_one_with_other_weights():
    layer = keras.layers.Dense(3, use_bias=False)
    layer.build((None, 2))
    layer.trainable = False
    # Not built yet, as a subclassed encoder is when it is loaded.
    other = keras.layers.Dense(3)
    restore_settings(other, omitted_settings(layer))
    other.build((None, 2))
    assert not other.trainable_weights


@pytest.mark.parametrize(
    "other",
    [
        lambda: keras.layers.Dense(3, use_bias=False),
        lambda: keras.Sequential([keras.layers.Dense(3)]),
    ],
    ids=["other weights", "other layers"],
)
def test_weights_that_were_frozen_alone_are_lost_with_a_warning(other):
    layer, other = keras.layers.Dense(3), other()
    for each in (layer, other):
        each.build((None, 2))
    layer.kernel.trainable = False
    with pytest.warns(UserWarning, match=r"Frozen weights.*Received: .* with 1 and 2$"):
        restore_settings(other, omitted_settings(layer))
    assert other.trainable_weights == other.weights


def test_state_is_neither_frozen_nor_trained():
    # As that of a masking, with which a model that is not built yet has more weights.
    nested = Nested()
    nested.build((None, 2))
    assert not any(omitted_settings(nested)["weights"])
    restore_settings(nested, omitted_settings(nested))
    assert not nested.norm.moving_mean.trainable


@pytest.mark.one_case
@pytest.mark.parametrize("is_trained", [False, True])
def test_the_temperature_of_a_frozen_backbone_stays_as_it_is(tmp_path, is_trained):
    backbone = kcm.models.clip_backbone("tiny", image_size=16, vocabulary_size=100)
    backbone.trainable = is_trained
    model = kcm.ContrastiveModel.from_backbone(backbone)
    if is_trained:
        # With the projections alone. TensorFlow skips a value that an attribute has.
        backbone.trainable = model.head.trainable = False
        for part in (model.head, backbone.vision_projection, backbone.text_projection):
            part.trainable = True
    assert len(model.trainable_weights) == 3 * is_trained
    assert len(reloaded(model, tmp_path).trainable_weights) == 3 * is_trained


def test_settings_are_numbers_and_names_alone():
    class Pooled(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.pooling = keras.layers.GlobalAveragePooling1D()
            self.attention = keras.layers.MultiHeadAttention(3, 2)

    assert settings_of(Pooled()) == [3]
