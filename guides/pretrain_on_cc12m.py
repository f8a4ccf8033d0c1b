"""
Title: Pre-train CLIP on CC12M by the paper's recipe
Author: the keras_cluster_mask authors
Date created: 2026/11/25
Last modified: 2026/11/26
Description: The recipe of the cluster-masking paper as one file, for any shards and devices.
Accelerator: GPU
"""

"""
## Introduction

[Efficient Vision-Language Pre-training by Cluster Masking](https://arxiv.org/abs/2405.08815)
trains a ViT-B/16 CLIP from scratch on CC12M, for 32 epochs of 10,968,539 pairs. This guide
is that recipe: the values of the command that its authors published are the defaults below,
each of its maskings is one line, and a table says what each of them costs before anything
is spent.

Nothing in it is tied to CC12M. Every setting is an environment variable, so the same file
trains a small model on the pictures of this repository, in a minute or two on two CPU cores:

```bash
export KERAS_BACKEND=jax DTYPE=float32 PRESET=budget RESULTS=results/tiny
export TRAIN="datasets/pictures/train-*.tar" HELD_OUT="datasets/pictures/test-*.tar"
export MODEL=tiny IMAGE_SIZE=48 PATCH_SIZE=8 CONTEXT_LENGTH=16
export PAIRS=3223 BATCH_SIZE=64 EPOCHS=2 WARMUP_STEPS=10 LEARNING_RATE=0.0015
python guides/pretrain_on_cc12m.py
```

The [other guide](pretrain_clip_with_cluster_masking.py) is the one to learn from; this one
is to run.
"""

"""
## Shards

CC12M comes as a list of addresses and captions,
[cc12m.tsv](https://github.com/google-research-datasets/conceptual-12m) (2.6 GB). Put a first
line with the names of its columns on top, `url` and `caption` with a tab between them, and
let [img2dataset](https://github.com/rom1504/img2dataset) fetch the images into shards,
about 330 GB:

```bash
img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption --output_format webdataset --output_folder cc12m --image_size 256 --resize_mode keep_ratio --processes_count 16 --thread_count 64
```

Some addresses of the list no longer answer, so your shards hold fewer pairs than the
paper's. The files `cc12m/*_stats.json` say how many (`successes`): add them up and set
`PAIRS`, which the learning rate's schedule goes by. `HELD_OUT` names shards to evaluate
on, which must not be among those of `TRAIN`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

import keras
import numpy as np

import keras_cluster_mask as kcm


def setting(name, default):
    """The environment variable `name`, of the type of its default."""
    return type(default)(os.environ.get(name, default))


PRESET = setting("PRESET", "rgb_0.5")
TRAIN = setting("TRAIN", "cc12m/*.tar")
HELD_OUT = setting("HELD_OUT", "")
PAIRS = setting("PAIRS", 10_968_539)
RESULTS = Path(setting("RESULTS", f"results/cc12m-{PRESET}"))

MODEL = setting("MODEL", "vit_b_16")
IMAGE_SIZE = setting("IMAGE_SIZE", 224)
PATCH_SIZE = setting("PATCH_SIZE", 16)
TOKENIZER = setting("TOKENIZER", "")  # A file; by default CLIP's own vocabulary.
CONTEXT_LENGTH = setting("CONTEXT_LENGTH", 77)

EPOCHS = setting("EPOCHS", 32)
BATCH_SIZE = setting("BATCH_SIZE", 2048)  # Over all devices together.
MICRO_BATCH_SIZE = setting("MICRO_BATCH_SIZE", 0) or None
LEARNING_RATE = setting("LEARNING_RATE", 5e-4)
WARMUP_STEPS = setting("WARMUP_STEPS", 2000)
WEIGHT_DECAY = setting("WEIGHT_DECAY", 0.2)
DTYPE = setting("DTYPE", "mixed_bfloat16")
SAVE_EVERY = setting("SAVE_EVERY", 500)
SEED = setting("SEED", 1)

# What is left of an epoch opens the next.
STEPS = EPOCHS * PAIRS // BATCH_SIZE
if STEPS <= WARMUP_STEPS:
    raise ValueError(
        f"`WARMUP_STEPS` must be less than the {STEPS} steps that `PAIRS`, `EPOCHS` and "
        f"`BATCH_SIZE` make. Received: WARMUP_STEPS={WARMUP_STEPS}"
    )

"""
## Devices

On one device there is nothing to do. The [README](../README.md) has a table of how programs
are launched on several. Processes, started by `torchrun` or with JAX's variables set, are
joined here, and JAX spreads each batch over all devices it sees. For several GPUs of
TensorFlow make and compile the model below within
`tf.distribute.MirroredStrategy().scope()`.

`BATCH_SIZE` stays what it is, and so do the negatives and the masks. If a device's share
of 2,048 does not fit into its memory, set `MICRO_BATCH_SIZE`, which counts the pairs on all
devices together too.
"""

joined = {"WORLD_SIZE", "KERAS_DISTRIBUTION_NUM_PROCESSES"} & os.environ.keys()
if joined:
    kcm.distribution.initialize()
say = print if kcm.distribution.is_main_process() else lambda *text: None

"""
## Maskings

3 % of the patches are anchors, and half of the patches are to go on average. The paper
masks by a threshold on similarity. Images differ in how much their clusters take, so every
image also loses a least share of its patches: 0.5 or 0.3, the *beta* of the paper, which
bounds what a batch costs. The embedding mix compares pixels at the start and tokens in the
end. It uses the threshold too, which follows the mix from step to step to keep the average.

`budget`, the default of this library, lets clusters grow until exactly half of each image
is gone. `flip` leaves out half at random.
"""


def clusters(**options):
    return kcm.ClusterMasking(PATCH_SIZE, 0.5, anchor_ratio=0.03, seed=SEED, **options)


zero_to_one = keras.optimizers.schedules.PolynomialDecay(0.0, STEPS, 1.0)
PRESETS = {
    "rgb_0.5": lambda: clusters(min_mask_ratio=0.5),
    "rgb_0.3": lambda: clusters(min_mask_ratio=0.3),
    "embedding": lambda: clusters(min_mask_ratio=0.3, embedding_weight=zero_to_one),
    "budget": lambda: clusters(),
    "flip": lambda: kcm.RandomMasking(0.5, seed=SEED),
    "none": lambda: None,
}

"""
## What it costs

The arithmetic of both towers, forward and backward, and the hours it takes one accelerator
at 40 % of what its data sheet says for bfloat16: 312 TFLOP/s for an A100, 989 for an H100
SXM. On eight of them it is an eighth. With the paper's settings:

| preset | image tokens | GFLOPs per pair | steps | total FLOPs | A100 hours | H100 hours |
| --- | --- | --- | --- | --- | --- | --- |
| rgb_0.5 | 98 | 70.1 | 171,383 | 2.46e+19 | 54.8 | 17.3 |
| rgb_0.3 | 137 | 91.0 | 171,383 | 3.19e+19 | 71.1 | 22.4 |
| embedding | 137 | 91.0 | 171,383 | 3.19e+19 | 71.1 | 22.4 |
| budget | 98 | 70.1 | 171,383 | 2.46e+19 | 54.8 | 17.3 |
| flip | 98 | 70.1 | 171,383 | 2.46e+19 | 54.8 | 17.3 |
| none | 196 | 123.3 | 171,383 | 4.33e+19 | 96.3 | 30.4 |

Choosing the patches is in it, and too little to show. Image tokens are those that are
computed: at a beta of 0.3 the clusters take half of an image on average, and yet 137 tokens
are computed, since one image of the batch may need them. Micro-batches add a third.
"""

UTILISATION = 0.4
PEAK = {"A100": 312e12, "H100": 989e12}

columns = ["preset", "image tokens", "GFLOPs per pair", "steps", "total FLOPs"]
columns += [f"{name} hours" for name in PEAK]
say("|", " | ".join(columns), "|")
for name, make in PRESETS.items():
    masking = make()
    patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
    kept = patches if masking is None else masking.num_kept(patches)
    flops = kcm.models.training_flops(
        MODEL, IMAGE_SIZE, CONTEXT_LENGTH, PATCH_SIZE, masking
    )
    if MICRO_BATCH_SIZE:
        flops *= 4 / 3
    total = flops * BATCH_SIZE * STEPS
    hours = [total / (UTILISATION * peak) / 3600 for peak in PEAK.values()]
    cells = [name, kept, f"{flops / 1e9:.1f}", f"{STEPS:,}", f"{total:.2e}"]
    say("|", " | ".join(map(str, [*cells, *(f"{x:.1f}" for x in hours)])), "|")

"""
## Data

CLIP's own vocabulary comes with open_clip (`pip install open_clip_torch`), or as the file
`bpe_simple_vocab_16e6.txt.gz`, to be named by `TOKENIZER`. Without either, a vocabulary is
learned from the captions of the first shards.

The crops are open_clip's, which the authors' code builds on: nine tenths of the area and
more.
"""

keras.utils.set_random_seed(SEED)
shards = kcm.data.list_shards(TRAIN)
RESULTS.mkdir(parents=True, exist_ok=True)
try:
    if TOKENIZER:
        tokenizer = kcm.data.CLIPTokenizer.from_file(TOKENIZER, CONTEXT_LENGTH)
    else:
        tokenizer = kcm.data.CLIPTokenizer.from_open_clip(CONTEXT_LENGTH)
except ImportError as error:
    say(f"Learning a vocabulary instead: {error}")
    tokenizer = kcm.data.CLIPTokenizer.train(
        kcm.data.read_captions(shards[:10]), 49_408, CONTEXT_LENGTH
    )
tokenizer.save(RESULTS / "tokenizer.json")


def training_data(batch_size, **options):
    return kcm.data.image_text_dataset(
        shards,
        tokenizer,
        IMAGE_SIZE,
        batch_size,
        training=True,
        seed=SEED,
        crop_scale=(0.9, 1.0),
        **options,
    )


train = training_data(BATCH_SIZE)

"""
## The threshold

`adapt` finds the threshold that leaves out half of the patches on average over 10,000
images, the patches that go for the least share included, as the authors' search counts
them. If that share is half by itself, clusters have nothing to add, and `adapt` says so. So
one threshold serves all presets, the one found at the beta of the authors' published
command, 0.3. With it `rgb_0.5` leaves out more than half: `mask_ratio` among the metrics
says how much.
"""

threshold = None
if getattr(PRESETS[PRESET](), "threshold", None) is not None:
    # Every process takes the same images and comes to the same threshold.
    sample = training_data(batch_size=64, process=(0, 1)).as_numpy_iterator()
    search = clusters(min_mask_ratio=0.3)
    # The masking sees pixels as the model scales them.
    search.adapt(kcm.models.pixels.normalize_pixels(b["images"]) for b in sample)
    threshold = float(search.threshold)
say(f"{PRESET}: threshold {threshold}, {STEPS} steps; results go to {RESULTS}")

"""
## Model and optimizer

The text tower, the temperature (0.07 at first, never below 0.01) and the loss are CLIP's.
Weights are float32, and computed with in bfloat16. Weight decay spares biases, the scales
of norms and the temperature: the model sees to it when it is compiled.
"""

if keras.backend.backend() == "jax":
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(auto_shard_dataset=False)
    )
keras.config.set_dtype_policy(DTYPE)
backbone = kcm.models.clip_backbone(
    MODEL, IMAGE_SIZE, tokenizer.vocabulary_size, CONTEXT_LENGTH, PATCH_SIZE
)
masking = PRESETS[PRESET]()
if threshold is not None:
    masking.threshold.assign(threshold)
model = kcm.ContrastiveModel.from_backbone(
    backbone, masking=masking, micro_batch_size=MICRO_BATCH_SIZE
)
schedule = keras.optimizers.schedules.CosineDecay(
    0.0,
    decay_steps=STEPS - WARMUP_STEPS,
    warmup_target=LEARNING_RATE,
    warmup_steps=WARMUP_STEPS,
)
optimizer = keras.optimizers.AdamW(
    schedule, weight_decay=WEIGHT_DECAY, beta_1=0.9, beta_2=0.98, epsilon=1e-6
)
model.compile(optimizer)

"""
## Training

Whatever ends the run, start the same command again: it goes on from the last checkpoint, in
the middle of an epoch too.
"""

checkpoint = kcm.callbacks.Checkpoint(
    RESULTS / "checkpoints", save_every=SAVE_EVERY, monitor=None
)
callbacks = [kcm.callbacks.Throughput(), checkpoint]
history = model.fit(train, epochs=EPOCHS, callbacks=callbacks, verbose=2)
if kcm.distribution.is_main_process():
    kcm.visualization.plot_history(history).savefig(RESULTS / "training.png", dpi=100)
    model.save(RESULTS / "model.keras")

"""
## Evaluation

Retrieval on held-out shards, whole images and all. Recall@k is the share of images whose
caption is among the k nearest ones, and the reverse; equal captions count as one. A run of
several processes ends with training: start the program once more as one process, and it
finds everything trained and evaluates.

The paper's tables are of other data: zero-shot retrieval on COCO and Flickr30k, ImageNet
classification, linear probes. Any such shards will do as `HELD_OUT`.
"""

if HELD_OUT and not joined:
    held_out = kcm.data.image_text_dataset(
        HELD_OUT,
        tokenizer,
        IMAGE_SIZE,
        batch_size=64,
        training=False,
        include_captions=True,
    )
    captions, images, texts = [], [], []
    for batch in held_out.as_numpy_iterator():
        captions.extend(batch.pop("captions"))
        embeddings = model.predict_on_batch(batch)
        images.append(embeddings["image_embeddings"])
        texts.append(embeddings["text_embeddings"])
    recall = kcm.evaluation.retrieval_recall(
        np.concatenate(images), np.concatenate(texts), captions
    )
    chance = kcm.evaluation.chance_recall(len(captions), image_labels=captions)
    for name, value in recall.items():
        print(f"{name:25} {value:6.1%}   chance {chance[name]:6.1%}")
