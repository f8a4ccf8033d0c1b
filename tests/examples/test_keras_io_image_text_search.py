"""The program for keras.io: a whole run, on tiny encoders and photographs."""

import functools
import io
import re
import runpy
import zipfile

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT, TRANSFORMER

pytestmark = pytest.mark.slow

SENTENCE = "a dog runs through the snow"
# Each caption has photographs of one color.
COLORS = {
    SENTENCE: (240, 240, 240),
    "a red car": (200, 20, 20),
    "a green tree": (20, 160, 20),
    "a blue boat": (20, 20, 220),
}


def write_flickr8k(folder, counts):
    """Writes archives like those of Flickr8k; returns the caption of each file."""
    rng, caption_of = np.random.default_rng(0), {}
    # The table of Flickr8k names a file that its archive lacks.
    lists = {"Flickr8k.token.txt": "absent.jpg.1#0\ta blue boat\n"}
    folder.mkdir()
    with zipfile.ZipFile(folder / "Flickr8k_Dataset.zip_archive", "w") as archive:
        for part, count in counts.items():
            names = [f"{part}_{i}.jpg" for i in range(count)]
            lists[f"Flickr_8k.{part}Images.txt"] = "\n".join(names)
            for i, name in enumerate(names):
                caption_of[name], color = [*COLORS.items()][i % len(COLORS)]
                pixels = color + rng.integers(-15, 16, (60, 90, 3))
                file = io.BytesIO()
                Image.fromarray(pixels.astype("uint8")).save(file, "JPEG")
                archive.writestr(f"Flicker8k_Dataset/{name}", file.getvalue())
                for k in range(5):
                    lists["Flickr8k.token.txt"] += f"{name}#{k}\t{caption_of[name]}\n"
    with zipfile.ZipFile(folder / "Flickr8k_text.zip_archive", "w") as archive:
        for name, content in lists.items():
            archive.writestr(name, content)
    return caption_of


def tiny_dino(preset, image_shape):
    assert preset == "dinov2_small"
    shapes = dict(image_shape=image_shape, position_embedding_shape=image_shape)
    return keras_hub.models.DINOV2Backbone(patch_size=14, **shapes, **TRANSFORMER)


def tiny_embedder(preset):
    assert preset == "all_minilm_l6_v2_en"
    words = sorted({word for caption in COLORS for word in caption.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    models = keras_hub.models
    tokenizer = models.BertTokenizer(vocabulary=vocabulary)
    return models.BertTextEmbedder(
        models.BertBackbone(len(vocabulary), max_sequence_length=256, **TRANSFORMER),
        models.BertTextEmbedderPreprocessor(tokenizer, sequence_length=256),
    )


def test_it_finds_photographs_by_their_captions(tmp_path, monkeypatch, capsys):
    caption_of = write_flickr8k(tmp_path / "datasets", {"train": 64, "test": 40})
    get_file = functools.partial(keras.utils.get_file, cache_dir=tmp_path)
    monkeypatch.setattr(keras.utils, "get_file", get_file)
    monkeypatch.setattr(keras_hub.models.Backbone, "from_preset", tiny_dino)
    monkeypatch.setattr(keras_hub.models.TextEmbedder, "from_preset", tiny_embedder)
    monkeypatch.setattr(plt, "show", plt.close)
    drops = set()

    class Dropout(keras.layers.Dropout):
        def call(self, inputs, training=False):
            drops.add(bool(training))
            return super().call(inputs, training=training)

    monkeypatch.setattr(keras.layers, "Dropout", Dropout)
    path = ROOT / "examples" / "keras_io_image_text_search.py"
    found = runpy.run_path(str(path), run_name="__main__")
    assert [caption_of[name] for name in found["best"]] == [SENTENCE] * 4
    # Ten photographs fit each caption, which is 25 % of the photographs.
    (recall,) = re.findall(r"recall@10: (\S+)%", capsys.readouterr().out)
    assert float(recall) > 90
    # `fit` turns dropout on only if `call` takes `training`, on JAX if it passes it on.
    assert drops == {False, True}
