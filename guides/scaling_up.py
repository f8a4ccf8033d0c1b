"""
Title: Scale up: larger batches, more devices, resumable runs
Author: the keras_cluster_mask authors
Date created: 2026/11/25
Last modified: 2026/11/26
Description: Micro-batches, data parallel training, checkpoints and more, on a CPU.
Accelerator: None
"""

"""
## Introduction

A useful CLIP is trained on millions of pairs, in batches of thousands, on several devices,
for days. This guide shows each part of such a run with a model so small that a CPU runs all
of it in a few minutes:

- batches larger than memory,
- several devices, here two virtual ones of a CPU,
- samples divided among processes, and epochs of a fixed number of steps,
- worker processes that decode images,
- a run that is interrupted, resumes and ends at the same weights,
- samples and tokens per second, with and without masking, and
- a locked image tower, learning rates by tower, tuning on whole images, a higher resolution,
  and export.

The [first guide](pretrain_clip_with_cluster_masking.py) explains the training itself, and the
[guide for CC12M](pretrain_on_cc12m.py) combines the parts into one long run.
"""

"""
## Setup

JAX and TensorFlow get two virtual devices, which must be set up before anything runs; on a
machine with accelerators remove these lines. With torch each device has its own process:
`torchrun --nproc-per-node=2 guides/scaling_up.py` runs the guide in two processes, and
`python` in one.
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


IMAGES = Path(__file__).resolve().parent.parent / "datasets" / "images"
TRAIN = setting("TRAIN", str(IMAGES / "train-*.tar"))
HELD_OUT = setting("HELD_OUT", str(IMAGES / "test-*.tar"))
RESULTS = Path(setting("RESULTS", "results/scaling_up"))
IMAGE_SIZE = setting("IMAGE_SIZE", 48)
PATCH_SIZE = 8
VOCABULARY_SIZE = setting("VOCABULARY_SIZE", 1000)
CONTEXT_LENGTH = 12
BATCH_SIZE = setting("BATCH_SIZE", 64)  # Over all devices together.
STEPS_PER_EPOCH = setting("STEPS_PER_EPOCH", 10)
EPOCHS = 2
SEED = 1

if kcm.distribution.is_main_process():
    RESULTS.mkdir(parents=True, exist_ok=True)
    # The interrupted run below starts from the beginning.
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
    """A small CLIP, each time with the same weights."""
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

Each image is compared with the texts of all other pairs of its batch, so a larger batch has
more negatives. `gradient_accumulation_steps` of a Keras optimizer does not have this effect: it
averages the gradients of small batches, each with few negatives.

`micro_batch_size` keeps all negatives. The encoders embed a few pairs at a time and keep no
activations; the loss compares all embeddings; then the activations are recomputed, a few
pairs at a time, for the gradients. This second forward pass adds about a third to the
arithmetic. `gradient_checkpointing=True` reduces memory further: each transformer block keeps
only its input and recomputes its activations for the gradients.

One step of gradient descent at a learning rate of 1 changes the weights by the gradients, so
the weights show whether the gradients are the same.
"""


def gradients(**options):
    model = make_model(clusters(), **options)
    model.compile(keras.optimizers.SGD(1.0))
    before = weights_of(model)
    model.fit(training_data(), steps_per_epoch=1, verbose=0)
    return before - weights_of(model)


whole = gradients()
micro = BATCH_SIZE // 4
in_parts = gradients(micro_batch_size=micro, gradient_checkpointing=True)
say(f"largest gradient, whole batch of {BATCH_SIZE:4}: {np.abs(whole).max():.4f}")
say(f"difference in micro-batches of {micro:4}: {np.abs(in_parts - whole).max():.1e}")

"""
## Devices

In data parallel training the batch is divided among the devices, each of which has all the
weights, and every image is still compared with the texts of all devices. `batch_size` counts
the pairs on all devices together, so learning rate, negatives and masks do not depend on the
number of devices.

On JAX and TensorFlow, make and train the model within a scope; without a list of devices both
use all accelerators. With torch the whole program runs in several processes: by `python` and
by `torchrun` it prints the same largest gradient above. The [README](../README.md) has a table
of how to start programs, on several machines too.
"""


def two_devices():
    """The scope of a model on two devices."""
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
Two virtual devices of one CPU save no time; they test a program before it runs on real ones.

A model too large for one device can be sharded over several, which Keras supports on JAX:
`clip_layout_map` shards the attention heads and hidden units of both towers. This costs two
all-reduces per block, forward and backward, so shard over as few devices as possible, and use
the other axis of the mesh for the batch.
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
        # The number of devices must divide that of the heads; "tiny" has three.
        large = kcm.models.clip_backbone(
            "vit_s_16", image_size=32, vocabulary_size=1000
        )
    whole_size = sum(x.value.nbytes for x in large.weights)
    own_size = sum(x.value.addressable_shards[0].data.nbytes for x in large.weights)
    print(f"a device holds {own_size / 2**20:.0f} of {whole_size / 2**20:.0f} MiB")

"""
## Samples by process

With several processes, `image_text_dataset` gives each process its part of every batch: with
the same `seed` all shuffle in the same order, and each reads and decodes only its own samples.
The batches are those of a single process. Here one process reads the parts of two, as NumPy
arrays.
"""


def first_keys(process):
    data = training_data(HELD_OUT, format="grain", include_keys=True, process=process)
    return next(iter(data))["keys"].tolist()


both = [first_keys((0, 2)), first_keys((1, 2))]
for index, keys in enumerate(both):
    say(f"process {index} of 2: {len(keys)} samples, the first {keys[0].decode()}")
say(f"together the batch of one process: {both[0] + both[1] == first_keys((0, 1))}")

"""
## Worker processes

The threads of one Python process decode up to about 3,000 images a second, whatever the number
of processors. If accelerators train faster than that, `num_workers` processes read and decode.
The batches stay the same, and `fit` starts the workers once.

Each worker imports the file that the program was started with. A file with the code of the
training at its top level, as this guide has it, would train in every worker. Put the training
into a function of a module, here `my_training.main`, and start it from a file that imports
nothing else, so that workers also save the memory of Keras:

```python
# train.py
if __name__ == "__main__":
    import my_training

    my_training.main(num_workers=8)
```
"""

"""
## Runs that resume

`kcm.callbacks.Checkpoint` saves the complete state of a run: weights, optimizer, seeds,
metrics, history and the position in the data. With `resume_from` the same program, started
again, continues from the last checkpoint, also within an epoch. It reads no sample before that
position again. The number of processes and of workers may change; other data, another
`seed` or another batch size are refused. A checkpoint takes the space of the weights and the
optimizer's moments, and a killed run loses the steps since the last one; `save_every` balances
the two. Training waits while the state is copied to the host's memory, not while the file is
written. The folder may be an address that fsspec knows, such as `gs://bucket/run`. The options of
`compile`, such as the learning rate, may change: the resumed run takes the new ones, with a
warning.

An epoch of web-scale shards is long. `steps_per_epoch` sets the number of steps between
logs, validation and the checkpoint at the end of an epoch, and the next epoch continues in
the data.
"""


def run(name, *callbacks):
    """A training run in a folder, which resumes if it was interrupted."""
    folder = RESULTS / "checkpoints" / name
    model = make_model(clusters())
    model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.2))
    checkpoint = kcm.callbacks.Checkpoint(folder, save_every=3)
    history = model.fit(
        training_data(),
        steps_per_epoch=STEPS_PER_EPOCH,
        epochs=EPOCHS,
        resume_from=folder,
        callbacks=[checkpoint, *callbacks],
        verbose=0,
    )
    return model, history.history["loss"]


uninterrupted, losses = run("uninterrupted")
say(f"loss after each {STEPS_PER_EPOCH} steps: {np.round(losses, 4)}")

"""
Here a callback interrupts a run in the middle of the second epoch, and the same function is
called again. On one CPU in float32 it ends at the weights of the run above, bit for bit.
"""


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 1 and batch == STEPS_PER_EPOCH // 2:
            raise KeyboardInterrupt


try:
    run("interrupted", Interrupt())
except KeyboardInterrupt:
    saves = (RESULTS / "checkpoints" / "interrupted").glob("step-*.npz")
    done = STEPS_PER_EPOCH + STEPS_PER_EPOCH // 2 + 1
    say(f"interrupted after {done} steps, last checkpoint {max(saves).name}")
model, _ = run("interrupted")
same = np.array_equal(weights_of(model), weights_of(uninterrupted))
say(f"the same weights, bit for bit: {same}")

"""
If the loss, or a weight that is to be saved, is NaN or infinite, `Checkpoint` saves nothing and
raises a `kcm.callbacks.NonFiniteError` that names the step, the samples of the batch and the
last good checkpoint. It looks every 100 steps, as looking at each would keep the device waiting,
and still names the step where it began. Look at these samples first; then resume with a lower
learning rate, a longer warm-up or gradient clipping.
"""

"""
## Speed

`kcm.callbacks.Throughput` adds `samples_per_second` and `tokens_per_second` to the logs. The
arithmetic grows with the tokens, so a masking of half of the patches trains on more samples
per second. If the gain is smaller than the tokens suggest, something else limits the speed,
such as the text tower or the data. Here the batches are in memory.
"""

models = {
    "no masking": make_model(),
    "random 50 %": make_model(kcm.RandomMasking(0.5, seed=SEED)),
    "cluster 50 %": uninterrupted,
}
for name in ("no masking", "random 50 %"):
    models[name].compile(keras.optimizers.AdamW(1e-3, weight_decay=0.2))
batches = [batch for _, batch in zip(range(5), training_data(format="grain"))]
in_memory = {key: np.concatenate([x[key] for x in batches]) for key in batches[0]}
speeds, tokens = dict.fromkeys(models, 0.0), {}
# In turn, and the best of four: other load on the machine slows all models equally.
for _ in range(4):
    for name, model in models.items():
        logs = model.fit(
            in_memory,
            batch_size=len(batches[0]["images"]),
            callbacks=[kcm.callbacks.Throughput()],
            verbose=0,
        ).history
        tokens[name] = logs["tokens_per_second"][0] / logs["samples_per_second"][0]
        speeds[name] = max(speeds[name], logs["samples_per_second"][0])
for name in models:
    say(
        f"{name:12} {tokens[name]:3.0f} tokens per sample, {speeds[name]:4.0f} samples/s"
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
axis.invert_yaxis()  # Shared by both plots.
if kcm.distribution.is_main_process():
    figure.savefig(RESULTS / "speed.png", dpi=100)

"""
## A locked image tower

[LiT](https://arxiv.org/abs/2111.07991) locks a pre-trained image tower and trains a text
tower to match it. Set `trainable` before `compile`. A locked tower has no gradients and no
optimizer state, but it is still computed, so masking still saves time.
"""

model, backbone = uninterrupted, uninterrupted.backbone
backbone.vision_encoder.trainable = False
model.compile(keras.optimizers.AdamW(1e-3))
image_tower, text_tower = map(
    weights_of, (backbone.vision_encoder, backbone.text_encoder)
)
model.fit(training_data(), steps_per_epoch=STEPS_PER_EPOCH, verbose=0)
for name, before in (("vision_encoder", image_tower), ("text_encoder", text_tower)):
    change = np.abs(weights_of(getattr(backbone, name)) - before).max()
    say(f"{name}: largest change of a weight {change:.1e}")
backbone.vision_encoder.trainable = True

"""
## Learning rates by tower

A pre-trained tower can also be trained slowly: `learning_rate_multipliers` are factors on the
learning rate by tower. Weight decay applies to matrices alone, not to biases, norms and the
temperature, unless `decay_vectors=True`. `log_gradient_norm` reports the norm of the gradients
of the whole batch before clipping, which helps to choose a limit.
"""

model = kcm.ContrastiveModel.from_backbone(backbone, clusters())
model.compile(
    keras.optimizers.AdamW(1e-3, weight_decay=0.2, global_clipnorm=1.0),
    learning_rate_multipliers={"image": 0.1},
    log_gradient_norm=True,
)
logs = model.fit(training_data(), steps_per_epoch=STEPS_PER_EPOCH, verbose=0)
say(f"mean norm of the gradients: {logs.history['gradient_norm'][-1]:.2f}")

"""
## Tuning on whole and on larger images

A model trained with masking has never seen a whole image. `without_masking` returns a model of
the same weights that trains on whole images, for a short last run at a low learning rate.

A higher resolution has more patches and costs more, so it also comes last. `with_image_size`
copies a backbone and interpolates its position embeddings. The embeddings of larger images
are close to those before; another `fit` adapts the model to the new resolution.
"""

whole_images = model.without_masking()
whole_images.compile(keras.optimizers.AdamW(1e-5))
losses = whole_images.fit(
    training_data(), steps_per_epoch=STEPS_PER_EPOCH, verbose=0
).history["loss"]
say(f"loss on whole images: {losses[-1]:.4f}")

LARGER = IMAGE_SIZE * 4 // 3


def read(image_size):
    """A batch of held-out images at a resolution."""
    data = kcm.data.image_text_dataset(
        HELD_OUT, tokenizer, image_size, BATCH_SIZE, training=False, format="grain"
    )
    return next(iter(data))["images"]


larger = kcm.ContrastiveModel.from_backbone(
    kcm.models.with_image_size(backbone, LARGER)
)
before = ops.convert_to_numpy(whole_images.encode_image(read(IMAGE_SIZE)))
after = ops.convert_to_numpy(larger.encode_image(read(LARGER)))
cosine = (before * after).sum(axis=-1).mean()
say(f"cosine of embeddings at {IMAGE_SIZE} and {LARGER} pixels: {cosine:.3f}")

"""
## Export

In a search engine each tower is deployed on its own. An exported image tower takes uint8
images in batches of any size and needs neither Keras nor this library: a SavedModel from JAX
and TensorFlow, an exported program from torch. `model.image_tower.save` writes a `.keras` file
instead.
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
