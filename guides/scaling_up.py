"""
Title: Scale up: larger batches, more devices, runs that survive
Author: the keras_cluster_mask authors
Date created: 2026/11/25
Last modified: 2026/11/25
Description: What training at scale takes, each part run and measured on a CPU.
Accelerator: None
"""

"""
## Introduction

A CLIP that is worth having has seen millions of pairs, in batches of thousands, on several
devices, for days. This guide walks through what that takes, on a model so small that a CPU
goes through all of it in a few minutes. It shows

- batches larger than memory, which train as if they fitted,
- several devices, here two virtual ones of a CPU,
- how processes share samples, and epochs counted in samples,
- a run that is cut off and ends at the same weights all the same,
- samples and tokens a second, with and without masking, and
- what else trainers ask for: a locked image tower, learning rates by tower, tuning on whole
  images, a higher resolution, and export.

Each part stands alone: take the cells you need. The
[first guide](pretrain_clip_with_cluster_masking.py) explains the training itself, and the
[one for CC12M](pretrain_on_cc12m.py) puts the parts together into one long run.
"""

"""
## Setup

JAX and TensorFlow are asked for two virtual devices, which has to be done before anything
runs; on a machine with accelerators leave these lines out. With torch a device is a process:
start the program by `torchrun --nproc-per-node=2 guides/scaling_up.py`, and all of it runs in
two; started by `python` it runs in one.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import shutil
from pathlib import Path

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure

import keras_cluster_mask as kcm

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as tf

    virtual = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [virtual, virtual]
    )
if "WORLD_SIZE" in os.environ:
    kcm.distribution.initialize()
say = print if kcm.distribution.is_main_process() else lambda *text: None


def setting(name, default):
    """The environment variable `name`, of the type of its default."""
    return type(default)(os.environ.get(name, default))


PICTURES = Path(__file__).resolve().parent.parent / "datasets" / "pictures"
TRAIN = setting("TRAIN", str(PICTURES / "train-*.tar"))
HELD_OUT = setting("HELD_OUT", str(PICTURES / "test-*.tar"))
RESULTS = Path(setting("RESULTS", "results/scaling_up"))
IMAGE_SIZE = setting("IMAGE_SIZE", 48)
PATCH_SIZE = 8
VOCABULARY_SIZE = setting("VOCABULARY_SIZE", 1000)
CONTEXT_LENGTH = 12
BATCH_SIZE = setting("BATCH_SIZE", 64)  # Over all devices together.
SAMPLES_PER_EPOCH = setting("SAMPLES_PER_EPOCH", 640)
SEED = 1

if kcm.distribution.is_main_process():
    RESULTS.mkdir(parents=True, exist_ok=True)
    # This guide wants to be cut off anew each time it is run.
    shutil.rmtree(RESULTS / "checkpoints", ignore_errors=True)
tokenizer = kcm.data.CLIPTokenizer.train(
    kcm.data.read_captions(TRAIN), VOCABULARY_SIZE, CONTEXT_LENGTH
)


def training_data(source=TRAIN, **options):
    return kcm.data.image_text_dataset(
        source, tokenizer, IMAGE_SIZE, BATCH_SIZE, training=True, seed=SEED, **options
    )


def clusters():
    return kcm.ClusterMasking(PATCH_SIZE, mask_ratio=0.5, seed=SEED)


def make_model(masking=None, **options):
    """The same small CLIP each time."""
    keras.utils.set_random_seed(SEED)
    backbone = kcm.models.clip_backbone(
        "tiny", IMAGE_SIZE, tokenizer.vocabulary_size, CONTEXT_LENGTH, PATCH_SIZE
    )
    return kcm.ContrastiveModel.from_backbone(backbone, masking, **options)


def weights_of(model):
    """All weights as one vector."""
    return np.concatenate([ops.convert_to_numpy(x).ravel() for x in model.weights])


say(f"Backend: {BACKEND}; results go to {RESULTS.resolve()}")

"""
## The batch is the number of negatives

Each image is told from the texts of all other pairs of its batch, so a larger batch is a
harder task, not just a better average. That is why `gradient_accumulation_steps` of a Keras
optimizer is no way out when memory runs short: it adds up gradients of small batches, each
with few negatives.

`micro_batch_size` keeps the negatives. The batch is embedded some pairs at a time, and their
activations are forgotten; the loss compares all embeddings; then the activations are computed
again, some pairs at a time, for the gradients. The price is that second pass forward, about a
third of the arithmetic. `loss_block_size` is for batches of many thousands, whose matrix of
all pairs is large itself: so many of its rows are held at a time. It has a default that you
will hardly need to change.

One step of plain gradient descent at a learning rate of 1 moves the weights by the gradients,
so the weights tell whether these are the same.
"""

one_batch = training_data().take(1).cache()


def gradients(**options):
    model = make_model(clusters(), **options)
    model.compile(keras.optimizers.SGD(1.0))
    before = weights_of(model)
    model.fit(one_batch, verbose=0)
    return before - weights_of(model)


whole = gradients()
in_parts = gradients(micro_batch_size=BATCH_SIZE // 4, loss_block_size=BATCH_SIZE // 4)
say(f"largest gradient, whole batch of {BATCH_SIZE:4}: {np.abs(whole).max():.4f}")
say(
    f"difference in micro-batches of {BATCH_SIZE // 4:4}: {np.abs(in_parts - whole).max():.1e}"
)

"""
## Devices

The batch is cut among the devices, each of which has all the weights, and every image is
still compared with the texts of all devices. `batch_size` counts the pairs on all devices
together, so learning rate, negatives and masks stay what they are when devices are added.

The model is made and trained within a scope on JAX and TensorFlow, and nothing else changes;
without a list of devices both take all accelerators there are. With torch the whole program
runs in as many processes as were started, so there is nothing to choose: started by `python`
and by `torchrun`, it has printed the same largest gradient above. The
[README](../README.md#larger-batches-more-devices-runs-that-survive) has a table of how
programs are launched, on several machines too.
"""


def two_devices():
    """The scope of a model that is to be on two devices."""
    if BACKEND == "jax":
        return keras.distribution.DataParallel(
            devices=keras.distribution.list_devices()[:2], auto_shard_dataset=False
        ).scope()
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()


if BACKEND == "torch":
    say(f"processes: {kcm.distribution.num_replicas()}")
else:
    with two_devices():
        shared = gradients()
    say(f"difference on two devices: {np.abs(shared - whole).max():.1e}")

"""
Two virtual devices of one CPU gain nothing in time; they show that a program is right before
it is given eight GPUs.

A model that does not fit one device is shared among several, which Keras does on JAX:
`clip_layout_map` deals out attention heads and hidden units of both towers. This costs two
sums over the devices in every block, forward and again backward, so share a model among as
few devices as will hold it, and give the batch the other axis of the mesh.
"""

if BACKEND == "jax":
    mesh = keras.distribution.DeviceMesh(
        (1, 2), ["batch", "model"], keras.distribution.list_devices()[:2]
    )
    distribution = keras.distribution.ModelParallel(
        layout_map=kcm.models.clip_layout_map(mesh),
        batch_dim_name="batch",
        auto_shard_dataset=False,
    )
    with distribution.scope():
        # The number of devices must divide the heads, of which "tiny" has three.
        large = kcm.models.clip_backbone(
            "vit_s_16", image_size=32, vocabulary_size=1000
        )
    whole_size = sum(x.value.nbytes for x in large.weights)
    own_size = sum(x.value.addressable_shards[0].data.nbytes for x in large.weights)
    print(f"a device holds {own_size / 2**20:.0f} of {whole_size / 2**20:.0f} MiB")

"""
## Samples by process

With several processes, each needs its own part of every batch. `image_text_dataset` sees to
it: all processes shuffle alike, for which they need the same `seed`, and each decodes its own
samples alone. Every process reads all shards, which costs reading, and keeps the batches those
of one process. Here two processes are played by one.

Epochs lie end to end. What does not fill a batch at the end of an epoch opens the next, so no
sample is dropped, and now and then an epoch has a step more.
"""


def first_keys(process):
    data = training_data(HELD_OUT, include_keys=True, process=process)
    return next(iter(data.as_numpy_iterator()))["keys"].tolist()


both = [first_keys((0, 2)), first_keys((1, 2))]
for index, keys in enumerate(both):
    say(f"process {index} of 2: {len(keys)} samples, the first {keys[0].decode()}")
say(f"together the batch of one process: {both[0] + both[1] == first_keys((0, 1))}")

held_out = training_data(HELD_OUT)
say("steps of three epochs:", [sum(1 for _ in held_out) for _ in range(3)])

"""
Over web-scale shards nobody waits for the end of an epoch. `samples_per_epoch` says after how
many samples logs, validation and checkpoints are due, whatever the size of the data, which is
read on where it was.
"""

STEPS = SAMPLES_PER_EPOCH // BATCH_SIZE
EPOCHS = 2


def run(name, *callbacks):
    """A training run in a folder; goes on with what it finds there."""
    model = make_model(clusters())
    model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.2))
    checkpoint = kcm.callbacks.Checkpoint(
        RESULTS / "checkpoints" / name, save_every=3, monitor=None
    )
    history = model.fit(
        training_data(),
        samples_per_epoch=SAMPLES_PER_EPOCH,
        epochs=EPOCHS,
        callbacks=[checkpoint, *callbacks],
        verbose=0,
    )
    return model, history.history["loss"]


uninterrupted, losses = run("uninterrupted")
say(f"loss after each {SAMPLES_PER_EPOCH} samples: {np.round(losses, 4)}")

"""
## Runs that survive

Machines are taken away, and programs are killed. `kcm.callbacks.Checkpoint` saves all that a
run is made of: weights, optimizer, seeds, metrics, history and the place in the data. The same
program, started again, goes on from the last save, in the middle of an epoch too. A save costs
a file of the weights and the optimizer's moments, and a run that is killed loses the steps
since the last one: choose `save_every` so that neither hurts.

Here a callback interrupts the run in the middle of the second epoch, and the same function is
called again. On one CPU, in float32, it ends at the very weights of the run above.
"""


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 1 and batch == STEPS // 2:
            raise KeyboardInterrupt


try:
    run("interrupted", Interrupt())
except KeyboardInterrupt:
    saves = (RESULTS / "checkpoints" / "interrupted").glob("step-*.npz")
    say(
        f"interrupted after {STEPS + STEPS // 2 + 1} steps, last save {max(saves).name}"
    )
model, _ = run("interrupted")
same = np.array_equal(weights_of(model), weights_of(uninterrupted))
say(f"the same weights, bit for bit: {same}")

"""
A loss that is NaN or infinite is not worth going on from, so nothing is saved of it.
`Checkpoint` raises a `kcm.callbacks.NonFiniteLossError` that names the step, the samples of
the batch and the last good checkpoint. Look at these samples first; then start again with a
lower learning rate, a longer warm-up or gradient clipping.
"""

"""
## Speed

`kcm.callbacks.Throughput` puts `samples_per_second` and `tokens_per_second` into the progress
bar and the history. Samples are what training is about, tokens what the arithmetic goes by: a
masking that leaves out half of the patches trains on more samples with as many tokens. If
samples do not keep up with tokens, the time goes elsewhere, to the text tower, say, or into
waiting for data. Here the batches are kept in memory, so that the data is left out.
"""

models = {
    "no masking": make_model(),
    "random 50 %": make_model(kcm.RandomMasking(0.5, seed=SEED)),
    "cluster 50 %": uninterrupted,
}
for name in ("no masking", "random 50 %"):
    models[name].compile(keras.optimizers.AdamW(1e-3, weight_decay=0.2))
in_memory = training_data().take(5).cache()
speeds, tokens = dict.fromkeys(models, 0.0), {}
# In turns, and the best of some: what else the machine does slows all alike.
for _ in range(4):
    for name, model in models.items():
        logs = model.fit(
            in_memory, callbacks=[kcm.callbacks.Throughput()], verbose=0
        ).history
        tokens[name] = logs["tokens_per_second"][0] / logs["samples_per_second"][0]
        speeds[name] = max(speeds[name], logs["samples_per_second"][0])
for name in models:
    say(
        f"{name:12} {tokens[name]:3.0f} tokens a sample, {speeds[name]:5.0f} samples a second"
    )

figure = Figure(figsize=(9, 2.6), layout="constrained")
for axis, title, values in zip(
    figure.subplots(1, 2, sharey=True),
    ("tokens per sample, text included", "samples per second"),
    (tokens, speeds),
):
    bars = axis.barh(list(values), list(values.values()), color=["C7", "C0", "C1"])
    axis.bar_label(bars, fmt="%.0f", padding=3)
    axis.margins(x=0.12)
    axis.set_title(title, fontsize=11)
axis.invert_yaxis()  # Of both, which share it.
if kcm.distribution.is_main_process():
    figure.savefig(RESULTS / "speed.png", dpi=100)

"""
## A locked image tower

[LiT](https://arxiv.org/abs/2111.07991) takes an image tower that has learned elsewhere, locks
it, and teaches a text tower to read it. Set `trainable` before `compile`. A locked tower has
no gradients and no optimizer state. Masking is still worth it, as the tower is still computed.
"""

model, backbone = uninterrupted, uninterrupted.backbone
backbone.vision_encoder.trainable = False
model.compile(keras.optimizers.AdamW(1e-3))
image_tower, text_tower = map(
    weights_of, (backbone.vision_encoder, backbone.text_encoder)
)
model.fit(training_data(), samples_per_epoch=SAMPLES_PER_EPOCH, verbose=0)
for name, before in (("vision_encoder", image_tower), ("text_encoder", text_tower)):
    change = np.abs(weights_of(getattr(backbone, name)) - before).max()
    say(f"{name}: largest change of a weight {change:.1e}")
backbone.vision_encoder.trainable = True

"""
## What the optimizer does to which weights

A tower that has learned elsewhere need not be locked, it may learn slowly:
`learning_rate_multipliers` are factors by tower. Weight decay is on matrices alone, not on
biases, norms and the temperature, unless `decay_vectors=True`. `log_gradient_norm` reports
the norm of the whole batch's gradients before they are clipped, which tells what to clip at.

With `remat=True` each transformer block keeps its input alone and computes the rest again for
the gradients: for towers so deep that even a micro-batch of them is too large.
"""

model = kcm.ContrastiveModel.from_backbone(backbone, clusters(), remat=True)
model.compile(
    keras.optimizers.AdamW(1e-3, weight_decay=0.2, global_clipnorm=1.0),
    learning_rate_multipliers={"image": 0.1},
    log_gradient_norm=True,
)
logs = model.fit(training_data(), samples_per_epoch=SAMPLES_PER_EPOCH, verbose=0)
say(f"mean norm of the gradients: {logs.history['gradient_norm'][-1]:.2f}")

"""
## Whole images in the end, and larger ones

What has trained on half images has never seen a whole one. `without_masking` gives a model of
the same weights that trains on whole images, for a short last run at a low learning rate. A
step of it costs what the masking had saved.

A higher resolution belongs there too: more patches are dear, so they come last.
`with_image_size` copies the weights and interpolates the positions of the patches. The copy
takes the larger images as they are, and its embeddings are close to those before, from where
it can be trained on. Between them and the end lies a `fit` as above.
"""

whole_images = model.without_masking()
whole_images.compile(keras.optimizers.AdamW(1e-5))
losses = whole_images.fit(
    training_data(), samples_per_epoch=SAMPLES_PER_EPOCH, verbose=0
).history["loss"]
say(f"loss on whole images: {losses[-1]:.4f}")

LARGER = IMAGE_SIZE * 4 // 3


def read(image_size):
    """A batch of held-out images at a resolution."""
    data = kcm.data.image_text_dataset(
        HELD_OUT, tokenizer, image_size, BATCH_SIZE, training=False
    )
    return next(iter(data.as_numpy_iterator()))["images"]


larger = kcm.ContrastiveModel.from_backbone(
    kcm.models.with_image_size(backbone, LARGER)
)
before = ops.convert_to_numpy(whole_images.encode_image(read(IMAGE_SIZE)))
after = ops.convert_to_numpy(larger.encode_image(read(LARGER)))
cosine = (before * after).sum(axis=-1).mean()
say(f"cosine of embeddings at {IMAGE_SIZE} and {LARGER} pixels: {cosine:.3f}")

"""
## Export

A tower is what is deployed: images are embedded once and stored, and queries are embedded as
they come. It takes uint8 images in batches of any size and needs neither Keras nor this library
any more: from JAX and TensorFlow as a SavedModel, from torch as an exported program.
`model.image_tower.save` writes a `.keras` file instead.
"""

images = read(LARGER)
if kcm.distribution.is_main_process():
    if BACKEND == "torch":
        import torch

        path = RESULTS / "image_tower.pt2"
        larger.image_tower.export(path, format="torch", verbose=False)
        exported = torch.export.load(path).module()
        found = exported(torch.tensor(images)).detach().numpy()
    else:
        import tensorflow as tf

        path = RESULTS / "image_tower"
        larger.image_tower.export(path, verbose=False)
        exported = tf.saved_model.load(path)
        found = exported.serve(images).numpy()
    say(f"{path.name}: largest difference {np.abs(found - after).max():.1e}")
