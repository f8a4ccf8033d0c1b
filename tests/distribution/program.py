"""Five steps of training on one device or on two, as a program.

    python program.py OUT single|devices|process|model

writes weights, losses and metrics to OUT. `devices` uses two virtual devices of one
process; `process` is one of two processes that the test starts; `model` uses four, of
which pairs share a model. It trains a model in each of the `ways`, for each value of
`duplicates`, and evaluates retrieval of all pairs; with CLIP=1 a keras_hub CLIP. With
MASKING=all it trains a model with each kind of masking instead, with the values of
`duplicates` in turn. With each of the others, it trains one model:
with SHARDS=files two epochs on these, validated on HELD_OUT and saved to CHECKPOINT;
with BAD_STEP=n, where the last image of the n-th step, which the second device gets, is
not finite, saved to CHECKPOINT; with FREEZE=rank, where that process alone freezes a
tower. With DIE_AT=n it ends itself before its n-th step.
"""

import os
import pathlib
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
out, how = sys.argv[1:]
backend = os.environ["KERAS_BACKEND"]
if how in ("devices", "model") and backend == "jax":
    count = 4 if how == "model" else 2
    flag = f" --xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag

import contextlib
import functools
import itertools

import keras
import numpy as np
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask import losses
from tests import helpers
from tests.helpers import MASKINGS, masked_vit, tiny_clip, tiny_siglip

BATCH, STEPS = 8, 5


def pairs():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 30, size=(BATCH * STEPS, 6)).astype("int32")
    if "CLIP" in os.environ:
        # Of other lengths from one device to the next, and padded to 24 tokens.
        lengths = np.resize([5, 20, 3, 4, 6, 4, 3, 5], len(ids))[:, None]
        ids = np.where(np.arange(24) < lengths, np.resize(ids, (len(ids), 24)), 0)
        np.put_along_axis(ids, lengths - 1, 29, axis=1)
    # Equal captions on different devices are positives of one another too.
    ids[7::8] = ids[0::8]
    images = rng.integers(0, 256, size=(len(ids), 16, 16, 3)).astype("uint8")
    weights = rng.uniform(0, 2, size=len(ids)).astype("float32")
    if "BAD_STEP" in os.environ:
        images = images / np.float32(64) - 2
        images[int(os.environ["BAD_STEP"]) * BATCH - 1] = np.nan
    return {"images": images, "token_ids": ids, "sample_weight": weights}


def make_model(masking=None, way="whole", **options):
    keras.utils.set_random_seed(0)
    if masking is None:
        # The threshold moves with the mask ratio of the whole batch.
        masking = kcm.ClusterMasking(
            patch_size=4,
            min_mask_ratio=0.25,
            threshold=0.05,
            embedding_weight=0.3,
            seed=1,
        )
    if "micro" in way:
        options["micro_batch_size"] = 4
    # Of micro-batches, blocks of two rows.
    losses.MAX_PAIRS = 2 * BATCH if "micro" in way else 2**24
    if "CLIP" in os.environ:
        helpers.CONTEXT = 24
        model = kcm.ContrastiveModel.from_backbone(
            tiny_clip(), masking=masking, **options
        )
        # Keys' biases have a gradient of 0, which rounding makes a step of Adam of.
        model.compile(keras.optimizers.Adam(1e-3, epsilon=1e-3))
        return model
    encoder = masked_vit(masking)
    model = kcm.ContrastiveModel(encoder, tiny_siglip().text_encoder, **options)
    if os.environ.get("FREEZE") == os.environ.get("RANK", "0") or "frozen" in way:
        model.image_encoder.trainable = False
    optimizer = helpers.by_tower(
        model,
        keras.optimizers.SGD(0.05, weight_decay=0.1, global_clipnorm=1.0),
        image=keras.optimizers.SGD(0.025, weight_decay=0.1, global_clipnorm=1.0),
    )
    model.compile(optimizer)
    return model


def make_masked_model(name, **options):
    masking = MASKINGS[name](num_prefix_tokens=0, seed=1)
    return make_model(masking, **options)


def ways():
    """The ways in which a model is trained, of which a single device needs two."""
    # Of other backends, the compiled code reduces gradients, whatever has some.
    parts = ["", "frozen "] if backend == "torch" else [""]
    sizes = ["whole"] if how == "single" else ["whole", "micro"]
    return [part + size for part in parts for size in sizes]


def makers():
    """Functions that make the models to train, by the beginning of names in OUT."""
    turns = itertools.cycle(["positive", "negative"])
    if "MASKING" in os.environ:
        kinds = {x: functools.partial(make_masked_model, x) for x in MASKINGS}
        return {
            f"{name}/": functools.partial(make, duplicates=next(turns))
            for name, make in kinds.items()
        }
    if {"BAD_STEP", "FREEZE", "SHARDS"} & {*os.environ}:
        return {"": make_model}
    return {
        f"{duplicates}/{way}/": functools.partial(
            make_model, way=way, duplicates=duplicates
        )
        for way in ways()
        for duplicates in ("positive", "negative")
    }


class Die(keras.callbacks.Callback):
    steps = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.steps += 1
        if self.steps == int(os.environ["DIE_AT"]):
            os._exit(7)


def distribute():
    """Sets up two devices; returns a context for the model."""
    if how == "process":
        kcm.distribution.initialize()
    if how == "model":
        guide = pathlib.Path(__file__).parents[2] / "guides" / "train_on_eight_gpus.py"
        code = guide.read_text().rpartition("# ```python\n")[2].partition("# ```")[0]
        exec("\n".join(line.removeprefix("# ") for line in code.splitlines()))
    elif backend == "jax" and how != "single":
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
    if backend == "tensorflow" and how == "devices":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        virtual = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [virtual, virtual])
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    return contextlib.nullcontext()


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
        history = {k: v for k, v in history.items() if "accuracy" not in k}
    weights = map(ops.convert_to_numpy, model.variables)
    arrays = {f"{name}weights/{i}": np.array(x) for i, x in enumerate(weights)}
    return arrays | {f"{name}history/{k}": np.array(x) for k, x in history.items()}


if __name__ == "__main__":
    scope, data = distribute(), pairs()
    fit = {"batch_size": BATCH, "shuffle": True, "validation_data": data}
    parts = int(os.environ["WORLD_SIZE"]) if (backend, how) == ("jax", "process") else 1
    if backend == "tensorflow" or parts > 1:
        import tensorflow as tf

        # Of evaluation, Keras tells TensorFlow the size of a dataset's batches, not of
        # arrays'; and of arrays, each process of JAX would evaluate all.
        evaluated = tf.data.Dataset.from_tensor_slices(data).batch(BATCH, True)
        fit["validation_data"] = evaluated.map(
            lambda batch: {
                name: tf.split(rows, parts)[int(os.environ.get("RANK", 0))]
                for name, rows in batch.items()
            }
        )
    callbacks = [Die()] if "DIE_AT" in os.environ else []
    if "BAD_STEP" in os.environ:
        callbacks.append(kcm.callbacks.Checkpoint(os.environ["CHECKPOINT"]))
    if {"BAD_STEP", "MASKING"} & {*os.environ}:
        # Masks are for training alone, and most of the time goes into compiling.
        fit = {"batch_size": BATCH, "shuffle": "BAD_STEP" not in os.environ}
    elif not {"CLIP", "SHARDS"} & {*os.environ}:
        callbacks.append(kcm.callbacks.Retrieval(pairs()))
    arrays = {}
    with scope:
        for name, make in makers().items():
            model = make()
            if "SHARDS" in os.environ:
                history = train_on_shards(model, callbacks)
            else:
                history = model.fit(data, verbose=0, callbacks=callbacks, **fit)
            arrays |= results(name, model, history.history)
    if how == "model":
        check_shares(model)
    if kcm.distribution.is_main_process():
        np.savez(out, **arrays)
