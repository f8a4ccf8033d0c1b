"""Prints the token ids of a text by saved models, and imports no more than the library.

python read_words.py MODEL...
"""

import json
import sys

import keras
import numpy as np

import keras_cluster_mask  # noqa: F401

for path in sys.argv[1:]:
    tokenizer = keras.saving.load_model(path).tokenizer
    found = None if tokenizer is None else tokenizer(["a dog"])
    if hasattr(found, "keys"):
        found = found["token_ids" if "token_ids" in found else "input_ids"]
    if keras.ops.is_tensor(found):
        found = keras.ops.convert_to_numpy(found)
    print(json.dumps(found if found is None else np.asarray(found).tolist()))
