"""Five steps of training on one device or on two, as a program.

    python program.py OUT single|devices|process|model [MICRO_BATCH_SIZE]

writes weights, losses and metrics to OUT. `devices` uses two virtual devices of one
process; `process` is one of two processes that the test starts; `model` uses four, of
which pairs share a model. With CLIP=1 the model is a keras_hub CLIP. With SHARDS=files
it trains two epochs on these, validates on HELD_OUT and saves to CHECKPOINT. With
DIE_AT=n it ends itself before its n-th step. With BAD_STEP=n the last image of the n-th
step, which the second device gets, is not finite, and it saves to CHECKPOINT. With
MASKING=all it trains a model with each kind of masking instead, and one of two views,
with the values of `duplicates` in turn.
With PLANS=all it trains a model in each way of `plans` instead, on torch. With
FREEZE=rank that process alone freezes a tower. Else it evaluates retrieval of all
pairs. DUPLICATES is an option of each other model.
"""

import os
import pathlib
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
out, how, *micro_batch_size = sys.argv[1:]
backend = os.environ["KERAS_BACKEND"]
if how in ("devices", "model") and backend == "jax":
    count = 4 if how == "model" else 2
    flag = f" --xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag

import contextlib
import itertools

import keras
import numpy as np
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask import losses
from tests.helpers import MASKINGS, masked_vit, tiny_clip, tiny_siglip

BATCH, STEPS = 8, 5
# Variables of runs that do not evaluate retrieval.
OTHERS = {"BAD_STEP", "CLIP", "MASKING", "PLANS", "SHARDS"}


def pairs():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 30, size=(BATCH * STEPS, 6)).astype("int32")
    # Equal captions on different devices are positives of one another too.
    ids[7::8] = ids[0::8]
    images = rng.integers(0, 256, size=(len(ids), 16, 16, 3)).astype("uint8")
    weights = rng.uniform(0, 2, size=len(ids)).astype("float32")
    if "BAD_STEP" in os.environ:
        images = images / np.float32(64) - 2
        images[int(os.environ["BAD_STEP"]) * BATCH - 1] = np.nan
    return {"images": images, "token_ids": ids, "sample_weight": weights}


def make_model(masking=None, **options):
    keras.utils.set_random_seed(0)
    if masking is None:
        # The threshold moves with the mask ratio of the whole batch.
        masking = kcm.ClusterMasking(
            4, min_mask_ratio=0.25, threshold=0.05, embedding_weight=0.3, seed=1
        )
    options.setdefault("micro_batch_size", int(*micro_batch_size or [0]) or None)
    options.setdefault("duplicates", os.environ.get("DUPLICATES", "positive"))
    if micro_batch_size:
        # Blocks of two rows.
        losses.MAX_PAIRS = 2 * BATCH
    if "CLIP" in os.environ:
        model = kcm.ContrastiveModel.from_backbone(
            tiny_clip(),
            masking,
            gradient_checkpointing=bool(micro_batch_size),
            **options,
        )
        # Keys' biases have a gradient of 0, which rounding makes a step of Adam of.
        model.compile(keras.optimizers.Adam(1e-3, epsilon=1e-3))
        return model
    if micro_batch_size:
        options["gradient_checkpointing"] = ["multi_head_attention"]
    model = kcm.ContrastiveModel(
        masked_vit(masking), tiny_siglip().text_encoder, **options
    )
    if os.environ.get("FREEZE") == os.environ.get("RANK", "0"):
        model.image_encoder.trainable = False
    compile_model(model)
    return model


def compile_model(model):
    optimizer = kcm.TowerOptimizer(
        keras.optimizers.SGD(0.05, weight_decay=0.1),
        image=keras.optimizers.SGD(0.025, weight_decay=0.1),
        global_clipnorm=1.0,
    )
    model.compile(optimizer, log_gradient_norm=True)


def fit_frozen(model, **fit):
    model.image_encoder.trainable = False
    compile_model(model)
    return model.fit(**fit)


def plans():
    """How models fit, and their options."""
    return {
        "frozen micro": (fit_frozen, {"micro_batch_size": 4}),
        "checkpointing": (
            kcm.ContrastiveModel.fit,
            {"gradient_checkpointing": ["multi_head_attention"]},
        ),
    }


class Die(keras.callbacks.Callback):
    steps = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.steps += 1
        if self.steps == int(os.environ["DIE_AT"]):
            os._exit(7)


def distribute(data):
    """Sets up two devices; returns a context for the model, and the data to fit."""
    if how == "process":
        kcm.distribution.initialize()
    if how == "model":
        devices = keras.distribution.list_devices()
        mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"], devices)
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(
                layout_map=kcm.models.clip_layout_map(mesh),
                batch_dim_name="batch",
                auto_shard_dataset=False,
            )
        )
    elif backend == "jax" and how != "single":
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


def check_shares(model):
    """Every device has half of the weights of attention and MLPs, and their moments."""
    variables = [*model.variables, *model.optimizer.variables]
    shared = [v for v in variables if "kernel" in v.path and "block" in v.path]
    assert len(shared) == 3 * 6 * 2, len(shared)
    for variable in shared:
        share = variable.value.addressable_shards[0].data
        assert 2 * share.size == variable.value.size, variable.path


def tokenizer(captions):
    # Texts that differ in every token: of texts that differ in a word, a masking leaves
    # equal ones, among which rounding decides which is the most similar.
    rows = [np.random.default_rng(zlib.crc32(caption.encode())) for caption in captions]
    return np.stack([row.integers(1, 30, 6) for row in rows]).astype("int32")


def train_on_shards(model, callbacks):
    train, held_out = (
        kcm.data.image_text_dataset(
            os.environ[name],
            tokenizer,
            image_size=16,
            batch_size=BATCH,
            training=name == "SHARDS",
            seed=3,
        )
        for name in ("SHARDS", "HELD_OUT")
    )
    return model.fit(
        train,
        verbose=0,
        epochs=2,
        validation_data=held_out,
        resume_from=os.environ["CHECKPOINT"],
        callbacks=[kcm.callbacks.Checkpoint(os.environ["CHECKPOINT"]), *callbacks],
    )


def results(name, model, history):
    if model.duplicates == "negative":
        # Equal captions have equal embeddings, and rounding decides between them.
        history = {k: v for k, v in history.items() if "image_to_text_acc" not in k}
    weights = map(ops.convert_to_numpy, model.variables)
    arrays = {f"{name}weights/{i}": np.array(x) for i, x in enumerate(weights)}
    return arrays | {f"{name}history/{k}": np.array(x) for k, x in history.items()}


if __name__ == "__main__":
    scope, data = distribute(pairs())
    fit = {"batch_size": BATCH // (2 if how == "process" else 1), "shuffle": False}
    # In evaluation every process of torch has all pairs.
    fit["validation_data"] = pairs() if backend == "torch" else data
    fit["validation_batch_size"] = BATCH
    if backend == "tensorflow" or (backend == "jax" and how == "process"):
        import tensorflow as tf

        # Of evaluation, Keras tells TensorFlow the size of a dataset's batches, not of
        # arrays'; and it hands out arrays on JAX as if every process had all of them.
        evaluated = tf.data.Dataset.from_tensor_slices(data)
        fit["validation_data"] = evaluated.batch(fit["batch_size"], drop_remainder=True)
        fit["validation_batch_size"] = None
    with scope:
        models = {} if "PLANS" in os.environ else {"": make_model()}
        if "MASKING" in os.environ:
            options = {"num_prefix_tokens": 0, "seed": 1}
            turns = itertools.cycle(["positive", "negative"])
            models = {
                f"{x}/": make_model(MASKINGS[x](**options), duplicates=next(turns))
                for x in MASKINGS
            }
            models["views/"] = make_model(views=2, duplicates=next(turns))
            # Masks are for training alone, and most of the time goes into compiling.
            fit = {"batch_size": fit["batch_size"], "shuffle": False}
        callbacks = [Die()] if "DIE_AT" in os.environ else []
        if "BAD_STEP" in os.environ:
            folder = os.environ["CHECKPOINT"]
            callbacks.append(kcm.callbacks.Checkpoint(folder))
            fit = {"batch_size": fit["batch_size"], "shuffle": False}
        if not OTHERS & {*os.environ}:
            callbacks.append(kcm.callbacks.Retrieval(pairs()))
        arrays = {}
        for name, model in models.items():
            if "SHARDS" in os.environ:
                history = train_on_shards(model, callbacks)
            else:
                history = model.fit(data, verbose=0, callbacks=callbacks, **fit)
            arrays |= results(name, model, history.history)
        for name, (train, options) in (
            plans() if "PLANS" in os.environ else {}
        ).items():
            # Its layers have the names of those of the first model.
            keras.utils.clear_session()
            model = make_model(**options)
            history = train(
                model, x=data, verbose=0, shuffle=False, batch_size=fit["batch_size"]
            )
            arrays |= results(f"{name}/", model, history.history)
    if how == "model":
        check_shares(model)
    if kcm.distribution.is_main_process():
        np.savez(out, **arrays)
