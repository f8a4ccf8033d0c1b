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
is that recipe: the values of the authors' published command are the defaults below, and each
masking of the paper is one line.

Every setting is an environment variable, so the same file trains other models on other data,
such as a small one on the images of this repository, in a minute or two on two CPU cores:

```bash
export KERAS_BACKEND=jax DTYPE=float32 PRESET=budget RESULTS=results/tiny
export TRAIN="datasets/images/train-*.tar" HELD_OUT="datasets/images/test-*.tar"
export MODEL=tiny IMAGE_SIZE=48 PATCH_SIZE=8 CONTEXT_LENGTH=16
export PAIRS=3223 BATCH_SIZE=64 EPOCHS=2 WARMUP_STEPS=10 LEARNING_RATE=0.0015
python guides/pretrain_on_cc12m.py
```

To learn the library, read the [first guide](pretrain_clip_with_cluster_masking.py).
"""

"""
## Shards

CC12M is a list of addresses and captions,
[cc12m.tsv](https://github.com/google-research-datasets/conceptual-12m) (2.6 GB). Add a first
line with the names of its columns, `url` and `caption` with a tab between them.
[img2dataset](https://github.com/rom1504/img2dataset) downloads the images into shards of
about 330 GB:

```bash
img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption --output_format webdataset --output_folder cc12m --image_size 256 --resize_mode keep_ratio --processes_count 16 --thread_count 64
```

Training reads an index of the shards, a small hidden file beside each. This command makes it
in 16 processes, and prints the number of intact pairs and what is wrong with the others:

```bash
python -m keras_cluster_mask.data check "cc12m/*.tar" --workers 16
```

Some addresses no longer exist, so your shards hold fewer pairs than the paper's. Set `PAIRS`
to the number that `check` prints; the schedule of the learning rate depends on it. `HELD_OUT`
names shards for evaluation, which must not be among those of `TRAIN`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

import keras

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
GRADIENT_CHECKPOINTING = bool(setting("GRADIENT_CHECKPOINTING", 0))
LEARNING_RATE = setting("LEARNING_RATE", 5e-4)
WARMUP_STEPS = setting("WARMUP_STEPS", 2000)
WEIGHT_DECAY = setting("WEIGHT_DECAY", 0.2)
DTYPE = setting("DTYPE", "mixed_bfloat16")
SAVE_EVERY = setting("SAVE_EVERY", 500)
NUM_WORKERS = setting("NUM_WORKERS", 0)  # Of each process; see Data.
SEED = setting("SEED", 1)

STEPS_PER_EPOCH = PAIRS // BATCH_SIZE
STEPS = EPOCHS * STEPS_PER_EPOCH
if STEPS <= WARMUP_STEPS:
    raise ValueError(
        f"`WARMUP_STEPS` must be less than the {STEPS} steps that `PAIRS`, `EPOCHS` and "
        f"`BATCH_SIZE` make. Received: WARMUP_STEPS={WARMUP_STEPS}"
    )

"""
## Devices

On one device nothing is needed. For several, the [README](../README.md) has a table of how to
start programs: the processes of `torchrun` or JAX are connected here, and JAX divides each
batch among all its devices. For several GPUs on TensorFlow, make and compile the model below
within `tf.distribute.MirroredStrategy().scope()`.

`BATCH_SIZE`, the negatives and the masks do not depend on the number of devices. If a device's
share of the 2,048 pairs does not fit into its memory, set `MICRO_BATCH_SIZE`, which also counts
the pairs on all devices together, or `GRADIENT_CHECKPOINTING=1`.
"""

joined = {"WORLD_SIZE", "KERAS_DISTRIBUTION_NUM_PROCESSES"} & os.environ.keys()
if joined:
    kcm.distribution.initialize()
say = print if kcm.distribution.is_main_process() else lambda *text: None

"""
## Maskings

3 % of the patches are anchors, and the mask ratio is 0.5 on average. The paper masks by a
threshold on the similarity. The clusters of images differ in size, so each image also loses a
minimum share of its patches: 0.5 or 0.3, the *beta* of the paper, which limits the cost of a
batch. The embedding mix compares pixels at the start of the training and tokens at its end; its
threshold follows the mix from step to step to keep the average.

`budget`, the default of this library, grows the clusters until exactly half of each image is
masked. `flip` masks half at random.
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
## Cost

The floating-point operations of both towers, forward and backward, with the settings of the
paper, counted from the shapes of all matrix products
([`training_flops`](../benchmarks/flops.py)). The hours are those of one accelerator at 40 % of
its bfloat16 peak in the data sheet: 312 TFLOP/s for an A100, 989 for an H100 SXM. Eight of
them take an eighth.

| preset | image tokens | GFLOPs per pair | steps | total FLOPs | A100 hours | H100 hours |
| --- | --- | --- | --- | --- | --- | --- |
| rgb_0.5 | 98 | 70.1 | 171,360 | 2.46e+19 | 54.8 | 17.3 |
| rgb_0.3 | 137 | 91.0 | 171,360 | 3.19e+19 | 71.1 | 22.4 |
| embedding | 137 | 91.0 | 171,360 | 3.19e+19 | 71.1 | 22.4 |
| budget | 98 | 70.1 | 171,360 | 2.46e+19 | 54.8 | 17.3 |
| flip | 98 | 70.1 | 171,360 | 2.46e+19 | 54.8 | 17.3 |
| none | 196 | 123.3 | 171,360 | 4.33e+19 | 96.3 | 30.4 |

The choice of patches is included and too small to show. At a beta of 0.3 half of an image is
masked on average, but 137 tokens are computed, since one image of the batch may need them.
Micro-batches add a third.
"""

"""
## Data

CLIP's vocabulary is part of open_clip (`pip install open_clip_torch`); its file
`bpe_simple_vocab_16e6.txt.gz` can also be given as `TOKENIZER`. Without either, a vocabulary is
trained on the captions of the first shards.

The crops are those of open_clip, on which the authors' code is built: at least nine tenths of
the area.

The threads of a Python process decode up to about 3,000 images a second. If the devices of a
process train faster, set `NUM_WORKERS`; the batches stay the same. Each worker process imports
the file that the program was started with, so start this guide from a file of three lines:

```python
if __name__ == "__main__":
    import runpy

    runpy.run_path("guides/pretrain_on_cc12m.py")
```
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
    say(f"Training a vocabulary instead: {error}")
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


train = training_data(BATCH_SIZE, num_workers=NUM_WORKERS)

"""
## The threshold

`adapt` finds the threshold that masks half of the patches on average over up to 10,000 images.
As in the authors' search, this includes the patches masked to reach the minimum share. It needs a
minimum below the average, so all presets use the threshold found at a beta of 0.3, that of the
authors' published command. With it `rgb_0.5` masks more than half; the metric `mask_ratio`
shows how much.
"""

threshold = None
if getattr(PRESETS[PRESET](), "threshold", None) is not None:
    # Every process reads the same images and finds the same threshold.
    sample = training_data(batch_size=64, process=(0, 1), format="grain")
    search = clusters(min_mask_ratio=0.3)
    # The model normalises images before the masking sees them.
    search.adapt(
        kcm.models.pixels.normalize_pixels(batch["images"])
        for _, batch in zip(range(len(sample)), sample)
    )
    threshold = float(search.threshold)
say(f"{PRESET}: threshold {threshold}, {STEPS} steps; results go to {RESULTS}")

"""
## Model and optimizer

The text tower, the temperature (0.07 at the start, at least 0.01) and the loss are CLIP's.
Weights are float32 and computations bfloat16. Weight decay applies to matrices alone, not to
biases, the scales of norms and the temperature; `compile` of the model excludes them.
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
    backbone,
    masking=masking,
    micro_batch_size=MICRO_BATCH_SIZE,
    gradient_checkpointing=GRADIENT_CHECKPOINTING,
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

If the run is interrupted, start the same command again: it resumes from the last checkpoint,
also within an epoch.
"""

folder = RESULTS / "checkpoints"
history = model.fit(
    train,
    epochs=EPOCHS,
    steps_per_epoch=STEPS_PER_EPOCH,
    resume_from=folder,
    callbacks=[
        kcm.callbacks.Throughput(),
        kcm.callbacks.Checkpoint(folder, save_every=SAVE_EVERY),
    ],
    verbose=2,
)
if kcm.distribution.is_main_process():
    kcm.visualization.plot_history(history).savefig(RESULTS / "training.png", dpi=100)
    model.save(RESULTS / "model.keras")

"""
## Evaluation

Retrieval on whole images of held-out shards. Recall@k is the share of images whose caption is
among the k most similar ones, and the reverse; equal captions count as one. A run of several
processes ends after the training: start the program again as one process to evaluate the
model.

The paper reports zero-shot retrieval on COCO and Flickr30k, ImageNet classification and linear
probes; see the [guide to evaluation](evaluate_zero_shot.py).
"""

if HELD_OUT and not joined:
    held_out = kcm.data.image_text_dataset(
        HELD_OUT, tokenizer, IMAGE_SIZE, batch_size=64, training=False
    )
    recall = kcm.evaluation.evaluate_retrieval(
        model, held_out, duplicates="positive", verbose=0
    )
    for name, value in recall.items():
        print(f"{name:25} {value:6.1%}")
