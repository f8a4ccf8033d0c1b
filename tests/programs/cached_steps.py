"""Trains on JAX, and keeps compiled programs in a folder.

python cached_steps.py FOLDER
"""

import sys

import jax
import numpy as np

import keras_cluster_mask as kcm

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
masking = kcm.RandomMasking(0.5, seed=0)
model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
model.compile("adamw")
pairs = {
    "images": np.zeros((4, 32, 32, 3), "uint8"),
    "token_ids": np.full((4, 16), 99, "int32"),
}
model.fit(pairs, batch_size=2, verbose=0)
