"""Ranks photographs by a sentence, with no more imports than the library.

python read_words.py FOLDER MODEL...
"""

import json
import pathlib
import sys

import keras

import keras_cluster_mask  # noqa: F401

photos = sorted(pathlib.Path(sys.argv[1]).glob("*.png"))
for path in sys.argv[2:]:
    model = keras.saving.load_model(path)
    if model.tokenizer is None:
        print("null")
        continue
    scores = model.encode_image(photos) @ model.encode_text(["a dog"]).T
    print(json.dumps(scores[:, 0].tolist()))
