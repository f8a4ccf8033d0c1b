"""Trains on arrays and on shards, evaluates and plots: what needs no extra.

python without_extras.py SHARD
"""

import sys

import keras
import numpy as np

import keras_cluster_mask as kcm


def train_own_encoders():
    images = keras.Input((8, 8, 3))
    x = keras.layers.Reshape((4, 8))(keras.layers.Conv2D(8, 4, strides=4)(images))
    x = keras.layers.Dense(8, name="embedded")(x)
    x = keras.layers.Dense(8)(keras.layers.GlobalAveragePooling1D()(x))
    masking = kcm.ClusterMasking(4)
    encoder = kcm.with_masking(keras.Model(images, x), masking, layer="embedded")
    ids = keras.Input((6,), dtype="int32")
    y = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(30, 8)(ids))
    model = kcm.ContrastiveModel(encoder, keras.Model(ids, y))
    model.compile("adam")
    rng = np.random.default_rng(0)
    pairs = {
        "images": rng.integers(0, 256, size=(4, 8, 8, 3)).astype("uint8"),
        "token_ids": rng.integers(1, 30, size=(4, 6)).astype("int32"),
    }
    history = model.fit(pairs, batch_size=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["mask_ratio"] == [0.5]
    assert model.predict(pairs, verbose=0)["image_embeddings"].shape == (4, 8)


def train_on_shards(shard):
    tokenizer = kcm.data.CLIPTokenizer.train(["a cat"], 600, context_length=6)
    train, test = (
        kcm.data.image_text_dataset(shard, tokenizer, 16, 4, training=training)
        for training in (True, False)
    )
    backbone = kcm.models.clip_backbone("tiny", 16, tokenizer.vocabulary_size, 6, 4)
    model = kcm.ContrastiveModel.from_backbone(backbone, kcm.ClusterMasking(4))
    model.compile("adamw")
    evaluate = kcm.callbacks.Retrieval(test)
    history = model.fit(train, epochs=1, verbose=0, callbacks=[evaluate]).history
    assert history["mask_ratio"] == [0.5]
    assert len(history["val_image_to_text_recall@1"]) == 1
    kcm.visualization.plot_masks(next(iter(test))["images"], model.masking)


if __name__ == "__main__":
    train_own_encoders()
    train_on_shards(sys.argv[1])
