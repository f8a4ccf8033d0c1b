"""Embeds pairs with a saved model, and imports no more than the library for it.

python predict.py MODEL PAIRS EMBEDDINGS
"""

import sys

import keras
import numpy as np

import keras_cluster_mask as kcm

path, pairs, embeddings = sys.argv[1:]
model = keras.saving.load_model(path)
assert isinstance(model, kcm.ContrastiveModel)
np.savez(embeddings, **model.predict(dict(np.load(pairs)), verbose=0))
print(model.duplicates)
