"""The last blocks of pre-trained encoders, or LoRA, are trained."""

import warnings

import keras
import keras_hub
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.models import with_context_length, with_image_size
from keras_cluster_mask.models.encoders import BLOCKS
from keras_cluster_mask.training.layers import all_layers
from tests.helpers import (
    FAST,
    TRANSFORMER,
    as_trained,
    assert_same_values,
    clip_with_lora,
    make_backbone,
    random_images,
    random_pairs,
    small_model,
    tiny_clip,
    to_numpy,
    value_and_gradients,
    values,
)

TWO = {**TRANSFORMER, "num_layers": 2}
VIT = {**TWO, "patch_size": 4, "image_shape": (16, 16, 3)}
TEXT = {**TWO, "vocabulary_size": 30, "max_sequence_length": 8}


def vit():
    sizes = dict(VIT)
    sizes["mlp_dim"] = sizes.pop("intermediate_dim")
    return keras_hub.models.ViTBackbone(**sizes)


def connected(images=vit, texts="Bert", **options):
    texts = getattr(keras_hub.models, f"{texts}Backbone")(**TEXT)
    return kcm.ContrastiveModel.from_encoders(images(), texts, 4, **options)


def two_towers(family, **options):
    backbone = make_backbone(family, sizes=TWO, **options)
    return kcm.ContrastiveModel.from_backbone(backbone, kcm.RandomMasking(0.5))


def half(**options):
    return connected(masking=kcm.RandomMasking(0.5), **options)


# A model, and how many weights follow the last block of each encoder.
MODELS = {
    "ViT, BERT": (half, 2, 0),
    "DeiT, RoBERTa": (
        lambda: connected(lambda: keras_hub.models.DeiTBackbone(**VIT), "Roberta"),
        *(2, 0),
    ),
    "DINOv2, DistilBERT": (
        lambda: half(
            images=lambda: keras_hub.models.DINOV2Backbone(**VIT), texts="DistilBert"
        ),
        *(2, 0),
    ),
    "DINOv3": (
        lambda: half(images=lambda: keras_hub.models.DINOV3Backbone(**VIT)),
        *(2, 0),
    ),
    "CLIP": (lambda: two_towers("CLIP", projection_dim=16), 2, 2),
    "MetaCLIP 2": (lambda: two_towers("MetaCLIP2", projection_dim=16), 0, 2),
    # With a pooling and a projection in the encoders.
    "SigLIP": (lambda: two_towers("SigLIP"), 17, 4),
}
each_model = pytest.mark.parametrize("kind", MODELS)


def pairs():
    return {**random_pairs(4), "token_ids": random_pairs(4)["token_ids"].clip(1)}


def fit(model, **options):
    return model.fit(pairs(), batch_size=4, shuffle=False, verbose=0, **options)


def blocks_of(encoder):
    blocks = [x for x in all_layers(encoder) if type(x).__name__ in BLOCKS]
    return sorted(blocks, key=lambda x: x.name)


def trained_in(encoder):
    return {id(v) for v in encoder.trainable_weights}


@each_model
def test_the_last_blocks_and_what_follows_are_trained(kind):
    make, *after = MODELS[kind]
    model = make()
    others = len(model.trainable_weights)
    encoders = model.image_encoder, model.text_encoder
    others -= sum(len(encoder.trainable_weights) for encoder in encoders)
    kcm.train_last_blocks(model, image=1, text=1)
    for encoder, count in zip(encoders, after):
        first, last = blocks_of(encoder)
        own = {id(v) for v in last.weights}
        assert own <= trained_in(encoder)
        assert len(trained_in(encoder)) == len(own) + count
    kcm.train_last_blocks(model, image=2, text=0)
    assert not trained_in(encoders[1])
    assert len(trained_in(encoders[0])) == 2 * len(own_weights(encoders[0])) + after[0]
    total = len(trained_in(encoders[0])) + others
    assert len(model.trainable_weights) == total


def own_weights(encoder):
    return blocks_of(encoder)[0].weights
