"""Trains on arrays and on shards, evaluates and plots: what needs no extra.

python without_extras.py SHARD
"""

import sys

import numpy as np

import keras_cluster_mask as kcm
from tests.helpers import patch_mlp, random_pairs, text_bag


def train_own_encoders():
    encoder = kcm.with_masking(
        patch_mlp(), kcm.ClusterMasking(patch_size=4), layer="positions"
    )
    model = kcm.ContrastiveModel(encoder, text_bag())
    model.compile("adam")
    pairs = random_pairs(4)
    history = model.fit(pairs, batch_size=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["mask_ratio"] == [0.5]
    assert model.predict(pairs, verbose=0)["image_embeddings"].shape == (4, 16)


def train_on_shards(shard):
    tokenizer = kcm.data.CLIPTokenizer.train(["a cat"], 600, context_length=6)
    train = kcm.data.image_text_dataset(
        shard,
        tokenizer,
        16,
        4,
        training=True,
        text_masking=kcm.data.RandomTextMasking(),
    )
    test = kcm.data.image_text_dataset(shard, tokenizer, 16, 4, training=False)
    backbone = kcm.models.clip_backbone("tiny", 16, tokenizer.vocabulary_size, 6, 4)
    model = kcm.ContrastiveModel.from_backbone(
        backbone,
        masking=kcm.ClusterMasking(patch_size=4),
        loss="sigmoid",
        micro_batch_size=2,
    )
    model.compile("adamw")
    evaluate = kcm.callbacks.Retrieval(test)
    history = model.fit(train, epochs=1, verbose=0, callbacks=[evaluate]).history
    assert history["mask_ratio"] == [0.5]
    assert len(history["val_image_to_text_recall@1"]) == 1
    kcm.visualization.plot_masks(next(iter(test))["images"], model.masking)


if __name__ == "__main__":
    train_own_encoders()
    train_on_shards(sys.argv[1])
