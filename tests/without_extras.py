"""Trains on shards, evaluates and plots without the packages of any extra."""

import sys


def main(shard):
    # The packages of `parquet`, `probe`, `search`, `tfrecord` and `weights`.
    for name in ("pyarrow", "sklearn", "faiss", "google_crc32c", "safetensors"):
        sys.modules[name] = None
    import keras_cluster_mask as kcm

    tokenizer = kcm.data.CLIPTokenizer.train(["a cat"], 600, context_length=6)
    train, test = (
        kcm.data.image_text_dataset(shard, tokenizer, 16, 4, training=training)
        for training in (True, False)
    )
    backbone = kcm.models.clip_backbone("tiny", 16, tokenizer.vocabulary_size, 6, 4)
    model = kcm.ContrastiveModel.from_backbone(backbone, kcm.ClusterMasking(4))
    model.compile("adamw")
    model.fit(train, epochs=1, verbose=0)
    kcm.evaluation.evaluate_retrieval(model, test, verbose=0)
    kcm.visualization.plot_masks(next(iter(test))["images"], model.masking)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
