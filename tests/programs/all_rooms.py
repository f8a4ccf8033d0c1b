"""Uses every room of the library once.

    python all_rooms.py SHARD

Writes to the current folder, and prints what else is to be compared.
"""

import pathlib
import sys

import keras
import keras_hub
import numpy as np
from PIL import Image

import keras_cluster_mask as kcm

NAMES = ["cat", "dog"]


def make_model():
    tokenizer = kcm.data.CLIPTokenizer.train(NAMES, 600, context_length=8)
    backbone = kcm.models.clip_backbone(
        "tiny", 16, tokenizer.vocabulary_size, context_length=8
    )
    backbone = kcm.models.with_image_size(backbone, 32)
    backbone = kcm.models.with_context_length(backbone, 6)
    model = kcm.ContrastiveModel.from_backbone(
        backbone, masking=kcm.ClusterMasking(patch_size=8)
    )
    model.compile("adam")
    return model, tokenizer.with_context_length(6)


def train_on_arrays(model, tokenizer):
    rng = np.random.default_rng(0)
    labels = np.arange(8) % 2
    images = rng.integers(0, 256, size=(8, 32, 32, 3)).astype("uint8")
    pairs = {"images": images, "token_ids": tokenizer([NAMES[x] for x in labels])}
    classes = (images, labels)
    fit = dict(batch_size=4, verbose=0, resume_from="run")
    callbacks = [
        kcm.callbacks.ZeroShot(classes, NAMES, tokenizer),
        kcm.callbacks.Checkpoint("run"),
    ]
    model.fit(pairs, callbacks=callbacks, **fit)
    history = model.fit(pairs, epochs=2, **fit)
    assert len(history.history["loss"]) == 2
    kcm.visualization.plot_history(history).savefig("history.png")
    masking = kcm.ClusterMasking(patch_size=8)
    kcm.visualization.plot_masks(images, masking).savefig("masks.png")
    return pairs, classes


def save_and_load(model, tokenizer, pairs, classes):
    model.save("model.keras")
    model.text_tower.save("tower.keras")
    loaded = keras.saving.load_model("model.keras")
    before, after = (x.predict(pairs, verbose=0) for x in (model, loaded))
    for key, values in before.items():
        np.testing.assert_array_equal(values, after[key])
    recall = kcm.evaluation.evaluate_retrieval("model.keras", pairs, verbose=0)
    assert 0 <= recall["image_to_text_recall@1"] <= 1
    texts = kcm.evaluation.embed_texts(loaded, NAMES, tokenizer, verbose=0)
    assert texts.shape == (2, 96)
    kcm.interop.save_open_clip(model, "clip.safetensors")
    again = kcm.interop.load_open_clip("clip.safetensors")
    assert again.backbone.count_params() == model.backbone.count_params()
    assert kcm.distribution.is_main_process()
    assert kcm.distribution.num_replicas() == 1


def read_files(shard):
    try:
        kcm.data.image_text_dataset(shard, None, 8, 2, training=False).as_dataset()
    except ImportError as error:
        print("refused:", error)
    folder = pathlib.Path("photographs")
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,caption\na.png,black\n")
    print("intact:", kcm.data.check(folder)["samples"])
    print(kcm.data.read_captions(shard)[:2])


def use_a_tokenizer_of_keras_hub():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NAMES]
    preprocessor = keras_hub.models.BertTextEmbedderPreprocessor(
        keras_hub.models.BertTokenizer(words), sequence_length=4
    )
    text = keras_hub.models.BertBackbone(7, 1, 1, 8, 8)
    image = keras_hub.models.ViTBackbone((16, 16, 3), 4, 1, 1, 8, 8)
    model = kcm.ContrastiveModel.from_encoders(image, text)
    texts = kcm.evaluation.embed_texts(model, NAMES, preprocessor, verbose=0)
    assert texts.shape == (2, 512)
    assert abs(texts[0] - texts[1]).max() > 1e-3


if __name__ == "__main__":
    shard = sys.argv[1]
    model, tokenizer = make_model()
    pairs, classes = train_on_arrays(model, tokenizer)
    save_and_load(model, tokenizer, pairs, classes)
    read_files(shard)
    use_a_tokenizer_of_keras_hub()
