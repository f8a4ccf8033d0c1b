"""Shared by the tests of the documentation: a reader's folder, and the quickstart."""

import importlib.util
import io
import json
import re

import keras
import keras_hub
import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from tests.helpers import ROOT, TRANSFORMER

# How many images each shard has in place of those of the repository.
SHARDS = {
    "train-00000": 64,
    "train-00001": 16,
    "validation-00000": 32,
    "test-00000": 64,
}


@pytest.fixture(scope="session")
def folder_of_data(tmp_path_factory, copy_datasets, encode, write_tar_to):
    """The data that pages name: small, in the places of large."""
    folder = tmp_path_factory.mktemp("docs")
    shards = copy_datasets(folder / "datasets", SHARDS) / "images"
    for name in ("shards", "cc12m", "own"):
        (folder / name).symlink_to(shards)

    def write(path, content):
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def encoded(red):
        return encode(Image.new("RGB", (60, 48), (red, 0, 0)))

    several = []
    for i in range(8):
        captions = json.dumps({"captions": [f"a {i}", f"the {i}"]}).encode()
        several += [(f"{i}.png", encoded(i)), (f"{i}.json", captions)]
    write_tar_to(shards / "coco-00000.tar", several)
    lines = [f"{i}.jpg\tnumber {i}\n" for i in range(128)]
    table = "photo_file\talt_text\n" + "".join(lines[:8])
    write("photos/table.tsv", table.encode())
    captions = "file_name,caption\n" + "".join(lines).replace("\t", ",")
    write("photos/captions.csv", captions.encode())
    for i in range(128):
        photo = Image.new("RGB", (60, 48), (2 * i, 0, 128))
        write(f"photos/{i}.jpg", encode(photo, "JPEG"))
        write(f"holiday/{i}.jpg", encode(photo, "JPEG"))
    for i in range(6):
        for place, name in enumerate(("daisy", "rose", "tulip")):
            for part in ("train", "test"):
                write(f"flowers/{part}/{name}/{i}.png", encoded(80 * place + i))
    write_records(folder / "records" / "train.tfrecord", encode)
    write_presets(folder)
    return folder


def write_presets(folder):
    """Writes tiny models in place of those that pages download."""
    captions = [f"number {i}" for i in range(64)]
    small = kcm.data.CLIPTokenizer.train(captions, 600, context_length=77)
    clip = kcm.models.clip_backbone("tiny", 48, small.vocabulary_size, 77)
    model = kcm.ContrastiveModel.from_backbone(clip)
    model.save_to_preset(folder / "clip_vit_base_patch16", small)
    write_siglip(folder / "siglip2_base_patch32_256", captions)
    models, shape = keras_hub.models, (224, 224, 3)
    dino = models.DINOV2Backbone(
        patch_size=14, image_shape=shape, position_embedding_shape=shape, **TRANSFORMER
    )
    dino.save_to_preset(folder / "dinov2_small")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "number"]
    tokenizer = models.BertTokenizer(vocabulary=words)
    pack = models.BertTextEmbedderPreprocessor(tokenizer, sequence_length=256)
    bert = models.BertBackbone(len(words), max_sequence_length=256, **TRANSFORMER)
    models.BertTextEmbedder(bert, pack).save_to_preset(folder / "all_minilm_l6_v2_en")
    if importlib.util.find_spec("transformers"):
        import transformers

        text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        image = dict(text, num_attention_heads=4, image_size=64)
        config = transformers.CLIPConfig(text_config=image, vision_config=image)
        transformers.CLIPModel(config).save_pretrained(folder / "clip-vit-base-patch32")


def write_siglip(folder, captions):
    import sentencepiece

    models, proto = keras_hub.models, io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=proto,
        vocab_size=30,
        hard_vocab_limit=False,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    image_encoder = models.SigLIPVisionEncoder(
        patch_size=32, image_shape=(256, 256, 3), **TRANSFORMER, name="vision_encoder"
    )
    text_encoder = models.SigLIPTextEncoder(
        30, 16, max_sequence_length=64, **TRANSFORMER, name="text_encoder"
    )
    backbone = models.SigLIPBackbone(image_encoder, text_encoder)
    tokenizer = models.SigLIPTokenizer(proto.getvalue())
    preprocessor = models.SigLIPPreprocessor(tokenizer, sequence_length=64)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    model.save_to_preset(folder, preprocessor)


def write_records(path, encode):
    import tensorflow as tf

    def feature(value):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for i in range(20):
            image = encode(Image.new("RGB", (60, 40), (i, 0, 0)), "JPEG")
            pair = {"jpg": feature(image), "txt": feature(b"a %d" % i)}
            features = tf.train.Features(feature=pair)
            writer.write(tf.train.Example(features=features).SerializeToString())


@pytest.fixture
def in_folder(folder_of_data, tmp_path, monkeypatch):
    """A folder of its own for what a page writes, with the data in it."""
    for path in folder_of_data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    images = folder_of_data / "datasets" / "images"
    monkeypatch.setattr(kcm.data, "example_images", lambda: images)
    return tmp_path


@pytest.fixture
def small_cifar100(monkeypatch):
    """A few images in place of a download."""
    part = np.zeros((16, 32, 32, 3), "uint8"), np.zeros((16, 1), "uint8")
    monkeypatch.setattr(keras.datasets.cifar100, "load_data", lambda: (part, part))


@pytest.fixture
def quickstart(in_folder):
    """What the first code of the quickstart makes; the how-to pages show it, too."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    setup = page.partition("[start:data]")[2].partition("[end:model]")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", setup, re.DOTALL | re.MULTILINE)
    scope = {"__name__": "__main__"}
    exec("".join(blocks), scope)
    # The page that evaluates it loads the file that the quickstart writes at its end.
    scope["model"].save("model.keras")
    return scope
