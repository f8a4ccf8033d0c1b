"""Five steps of training on one device or on two, as a program.

    python program.py OUT single|devices|process [MICRO_BATCH_SIZE]

writes weights, losses and metrics to OUT. `devices` uses two virtual devices of one
process; `process` is one of two processes that the test starts. With DIE_AT=n it ends
itself before its n-th step.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
out, how, *micro_batch_size = sys.argv[1:]
backend = os.environ["KERAS_BACKEND"]
if how == "devices" and backend == "jax":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import contextlib

import keras
import numpy as np
from keras import ops

import keras_cluster_mask as kcm
from tests.models.helpers import functional_vit, text_bag

BATCH, STEPS = 8, 5


def pairs():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 30, size=(BATCH * STEPS, 6)).astype("int32")
    # Equal captions on different devices are positives of one another too.
    ids[7::8] = ids[0::8]
    images = rng.integers(0, 256, size=(len(ids), 16, 16, 3)).astype("uint8")
    return {"images": images, "token_ids": ids}


def make_model():
    keras.utils.set_random_seed(0)
    # The threshold moves with the mask ratio of the whole batch.
    masking = kcm.ClusterMasking(
        4, min_mask_ratio=0.25, threshold=0.05, embedding_weight=0.3, seed=1
    )
    model = kcm.ContrastiveModel(
        kcm.with_masking(functional_vit(), masking, "positions"),
        text_bag(),
        micro_batch_size=int(*micro_batch_size or [0]) or None,
        loss_block_size=2 if micro_batch_size else None,
        remat=["multi_head_attention"] if micro_batch_size else False,
    )
    model.compile(
        keras.optimizers.SGD(0.05, weight_decay=0.1, global_clipnorm=1.0),
        learning_rate_multipliers={"image": 0.5},
        log_gradient_norm=True,
    )
    return model


class Die(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == int(os.environ["DIE_AT"]):
            os._exit(7)


def distribute(data):
    """Sets up two devices; returns a context for the model, and the data to fit."""
    if how == "process":
        kcm.distribution.initialize()
    if backend == "jax" and how != "single":
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
    if backend == "tensorflow" and how == "devices":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        virtual = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [virtual, virtual])
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope(), data
    if how == "process":
        # Each process has its own half of every batch.
        index = int(os.environ["RANK"])
        data = {
            key: value.reshape(STEPS, 2, BATCH // 2, *value.shape[1:])[:, index]
            for key, value in data.items()
        }
        data = {k: v.reshape(-1, *v.shape[2:]) for k, v in data.items()}
    return contextlib.nullcontext(), data


if __name__ == "__main__":
    scope, data = distribute(pairs())
    fit = {"batch_size": BATCH // (2 if how == "process" else 1), "shuffle": False}
    if backend == "tensorflow" or (backend == "jax" and how == "process"):
        import tensorflow as tf

        # Keras tells TensorFlow the size of a dataset's batches, not of arrays'; and it
        # hands out arrays on JAX as if every process had all of them.
        data = tf.data.Dataset.from_tensor_slices(data)
        data, fit = data.batch(fit["batch_size"], drop_remainder=True), {}
    # In evaluation every process of torch has all pairs.
    fit["validation_data"] = pairs() if backend == "torch" else data
    fit["validation_batch_size"] = BATCH if isinstance(data, dict) else None
    with scope:
        model = make_model()
        callbacks = [Die()] if "DIE_AT" in os.environ else []
        history = model.fit(data, verbose=0, callbacks=callbacks, **fit).history
    arrays = {
        f"weights/{index}": np.array(ops.convert_to_numpy(variable))
        for index, variable in enumerate(model.variables)
    }
    arrays |= {f"history/{name}": np.array(value) for name, value in history.items()}
    if kcm.distribution.is_main_process():
        np.savez(out, **arrays)
