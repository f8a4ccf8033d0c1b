"""A small training run with a checkpoint, also as a program that can be killed.

    python training_run.py SHARDS FOLDER WEIGHTS

resumes from FOLDER and writes the weights it ends with to WEIGHTS. With
KILL_AT_SYNC=n it kills itself at the n-th `fsync`, that is while it saves.
"""

import os
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import keras
import numpy as np

import keras_cluster_mask as kcm
from tests.helpers import (
    CONTEXT,
    MASKINGS,
    masked_vit,
    number_as_token,
    random_pairs,
    values,
)

PROGRAM = pathlib.Path(__file__)


def make_model(masking=None, optimizer=None, **options):
    """With all that has a state: dropout, a threshold that moves, EMA, a schedule."""
    keras.utils.set_random_seed(1)
    masking = masking or MASKINGS["threshold"](seed=3)
    encoder = masked_vit(masking, mix=keras.layers.Dropout(0.2, seed=5))
    ids = keras.Input((CONTEXT,), dtype="int32")
    x = keras.layers.Embedding(300, 16)(ids)
    x = keras.layers.Dropout(0.1)(keras.layers.GlobalAveragePooling1D()(x))
    texts = keras.Model(ids, keras.layers.Dense(16)(x))
    model = kcm.ContrastiveModel(encoder, texts)
    if optimizer is None:
        schedule = keras.optimizers.schedules.CosineDecay(0.01, 40, warmup_steps=5)
        optimizer = keras.optimizers.AdamW(schedule, use_ema=True, ema_momentum=0.9)
    eager = keras.backend.backend() == "tensorflow"
    model.compile(optimizer, run_eagerly=eager, **options)
    return model


def make_dataset(shards, **options):
    options = {"batch_size": 8, "seed": 7, "training": True, **options}
    return kcm.data.image_text_dataset(shards, number_as_token, 16, **options)


def weights_of(model):
    return values([*model.variables, *model.optimizer.variables])


def pairs(count=12, seed=0):
    return random_pairs(count, seed)


class StopAfter(keras.callbacks.Callback):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_train_batch_end(self, batch, logs=None):
        self.steps -= 1
        if self.steps == 0:
            raise KeyboardInterrupt


def kill_at_sync(count):
    sync, left = os.fsync, iter(range(count, 0, -1))

    def count_down(descriptor):
        if next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = count_down


if __name__ == "__main__":
    if "KILL_AT_SYNC" in os.environ:
        kill_at_sync(int(os.environ["KILL_AT_SYNC"]))
    shards, folder, weights = sys.argv[1:]
    model = make_model()
    model.fit(
        make_dataset(shards),
        epochs=6,
        verbose=0,
        resume_from=folder,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: print("step", flush=True)
            ),
            kcm.callbacks.Checkpoint(folder, keep=2),
        ],
    )
    np.savez(weights, *weights_of(model))
