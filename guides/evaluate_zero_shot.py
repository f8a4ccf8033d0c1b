"""
Title: Judge an image-text model: retrieval, zero-shot, linear probe, search
Author: the keras_cluster_mask authors
Date created: 2026/11/25
Last modified: 2026/11/25
Description: Measure what a CLIP model has learned, during fit() and after it, and search pictures with it.
Accelerator: None
"""

"""
## Introduction

A contrastive model is trained on pairs, and its loss says little about what it is good
for. It is judged by what it can do with pictures it has not seen:

- **retrieval**: does a picture find its caption among all captions, and a caption its
  picture?
- **zero-shot classification**: does it sort pictures into classes of which it is told
  nothing but the names?
- **linear probe**: how well can a linear classifier read classes off its embeddings?
- **composition**: does it prefer "a red cup on a blue plate" to "a blue cup on a red
  plate"?

This guide trains a small CLIP for a few minutes on two CPU cores, follows its retrieval
while it trains, measures all of the above afterwards, and searches pictures by words and
by pictures. The figures are those that the field's own tools give: recall and accuracies
equal [CLIP_benchmark](https://github.com/LAION-AI/CLIP_benchmark)'s.

It runs on JAX, TensorFlow and PyTorch alike; choose one with the environment variable
`KERAS_BACKEND`. Give both `MODEL` and `TOKENIZER`, files saved by `model.save` and
`tokenizer.save`, to judge a model of your own instead of training one.
"""

"""
## Setup
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

import keras
import numpy as np

import keras_cluster_mask as kcm

PICTURES = Path(__file__).resolve().parent.parent / "datasets" / "pictures"
TRAIN = PICTURES / "train-*.tar"
VALIDATION = PICTURES / "validation-*.tar"
TEST = PICTURES / "test-*.tar"
RESULTS = Path(os.environ.get("RESULTS", "results"))
MODEL = os.environ.get("MODEL")
EPOCHS = int(os.environ.get("EPOCHS", 9))
BATCH_SIZE = 64

keras.utils.set_random_seed(1)
RESULTS.mkdir(parents=True, exist_ok=True)
print(f"Backend: {keras.backend.backend()}; results go to {RESULTS.resolve()}")

"""
## Data

`ImageTextBatches` reads shards, manifests and plain folders of pictures. For evaluation it
gives every picture once, in order, cut to its middle exactly as open_clip does.
"""

captions = kcm.data.read_captions(TRAIN)
if MODEL:
    model = keras.saving.load_model(MODEL)
    tokenizer = kcm.data.CLIPTokenizer.from_file(os.environ["TOKENIZER"])
    image_size = kcm.models.image_size_of(model)
else:
    tokenizer = kcm.data.CLIPTokenizer.train(
        captions, vocabulary_size=3000, context_length=12
    )
    image_size = 48


def pictures(source, **options):
    """Pictures with their captions, for evaluation."""
    return kcm.data.ImageTextBatches(
        source,
        tokenizer,
        image_size=image_size,
        batch_size=BATCH_SIZE,
        training=False,
        include_captions=True,
        **options,
    )


"""
## Retrieval while it trains

`kcm.callbacks.Retrieval` measures recall on validation pairs at the end of epochs and writes
it into the logs, where `History`, `CSVLogger`, `TensorBoard`, `ModelCheckpoint` and
`EarlyStopping` find it: here the weights of the epoch with the best recall are kept.
"""

if not MODEL:
    backbone = kcm.models.clip_backbone(
        "tiny",
        image_size=image_size,
        vocabulary_size=tokenizer.vocabulary_size,
        context_length=tokenizer.context_length,
    )
    masking = kcm.ClusterMasking(patch_size=8, mask_ratio=0.5, seed=1)
    model = kcm.ContrastiveModel.from_clip(backbone, masking=masking)
    train = kcm.data.ImageTextBatches(
        TRAIN,
        tokenizer,
        image_size=image_size,
        batch_size=BATCH_SIZE,
        training=True,
        background=["white", "random"],
        crop_scale=(0.6, 1.0),
        seed=1,
    )
    steps = EPOCHS * (len(captions) // BATCH_SIZE)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=max(1, steps - steps // 10),
        warmup_target=1.5e-3,
        warmup_steps=steps // 10,
    )
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.1, beta_2=0.98))
    best = str(RESULTS / "best.weights.h5")
    history = model.fit(
        train,
        epochs=EPOCHS,
        callbacks=[
            kcm.callbacks.Retrieval(pictures(VALIDATION)),
            keras.callbacks.ModelCheckpoint(
                best,
                monitor="val_text_to_image_recall@10",
                mode="max",
                save_best_only=True,
                save_weights_only=True,
            ),
        ],
        verbose=2,
    )
    model.load_weights(best)
    model.save(RESULTS / "model.keras")
    tokenizer.save(RESULTS / "tokenizer.json")

"""
## Retrieval

Recall@k on held-out pairs, both ways, beside what chance would give. Captions that are equal
are equally right here (`duplicates="positive"`); the usual benchmarks, of which every
caption is different, need no such thing. Pictures with several captions each are read with
`include_captions="all"` and judged with `tokenizer=tokenizer`.
"""

recall = kcm.evaluation.evaluate_retrieval(
    model, pictures(TEST), duplicates="positive", verbose=0
)
found = kcm.evaluation.embed(model, pictures(TEST), verbose=0)
test_captions = [caption.decode() for caption in found["captions"]]
chance = kcm.evaluation.chance_recall(len(test_captions), image_labels=test_captions)
print(f"{'':26}recall   95 % interval   chance")
for name, value in recall.items():
    low, high = kcm.evaluation.wilson_interval(value, len(test_captions))
    print(f"{name:25} {value:6.1%}   {low:5.1%} - {high:5.1%}   {chance[name]:5.1%}")

"""
## Zero-shot classification

The names of the classes are all the model gets: each is put into templates, and a picture
goes to the class whose text is nearest. Usually labels come with the data
(`ImageTextBatches(..., label_key="cls")` for WebDataset, `label_key="folder"` for a folder
for each class). These pictures have captions only, so the pictures whose caption holds
exactly one of these words are taken, and the word is their class.
"""

CLASSES = [
    "flag",
    "food",
    "sign",
    "face",
    "animal",
    "woman",
    "man",
    "plant",
    "computer",
]
TEMPLATES = ["{}", "{}, symbol", "a {}", "flat drawing of a {}"]


def labelled(source):
    """Images and classes of the pictures whose caption names exactly one class."""
    for batch in pictures(source):
        words = [
            set(text.decode().replace(",", " ").split()) for text in batch["captions"]
        ]
        named = [
            [c for c, name in enumerate(CLASSES) if name in each] for each in words
        ]
        rows = [row for row, classes in enumerate(named) if len(classes) == 1]
        if rows:
            labels = np.array([named[row][0] for row in rows])
            yield {"images": batch["images"][rows], "labels": labels}


zero_shot = kcm.evaluation.evaluate_zero_shot(
    model, labelled(TEST), CLASSES, tokenizer, TEMPLATES, ks=(1, 2), verbose=0
)
counts = np.bincount(
    np.concatenate([batch["labels"] for batch in labelled(TEST)]),
    minlength=len(CLASSES),
)
print("Pictures of each class:", dict(zip(CLASSES, counts.tolist())))
print("Always the most frequent class:", f"{counts.max() / counts.sum():.1%}")
for name, value in zero_shot.items():
    print(f"{name:16} {value:.1%}")

"""
## Linear probe

A logistic regression on the frozen embeddings. How strongly it is regularised is chosen on
validation pictures; the test pictures are read once, at the end.
"""

probe = kcm.evaluation.evaluate_linear_probe(
    model,
    labelled(TRAIN),
    labelled(TEST),
    validation=labelled(VALIDATION),
    verbose=0,
)
for name in ("top_1", "mean_per_class"):
    print(f"{name:16} {probe[name]:.1%}")

"""
## Search

An index of embeddings, and a searcher that embeds what is asked for. Any folder of
pictures will do; here the held-out pictures are first taken out of their shards.
"""

folder = RESULTS / "held_out"
if not (folder / "metadata.jsonl").exists():
    kcm.data.preparation.convert([VALIDATION, TEST], folder / "metadata.jsonl")
index = kcm.search.ImageIndex.build(model, folder, verbose=0)
index.save(RESULTS / "index.npz")

searcher = kcm.search.Searcher(model, RESULTS / "index.npz", tokenizer)
words = searcher.by_text(
    [
        "smiling face",
        "red heart",
        "green flag",
        "fruit",
        "musical instrument",
        "road sign",
    ],
    k=6,
)
kcm.search.result_sheet(words, columns=6).save(RESULTS / "search_by_words.png")
like = searcher.by_image(
    [match.path for result in words[:3] for match in result.matches[:1]], k=6
)
kcm.search.result_sheet(like, columns=6).save(RESULTS / "search_by_pictures.png")
print(
    f"Pictures: {', '.join(str(path) for path in sorted(RESULTS.glob('search_*.png')))}"
)

"""
## Composition, and the usual benchmarks

[SugarCrepe](https://github.com/RAIVNLab/sugar-crepe) asks for the right one of two captions
that differ by a word or two. With its JSON files and the pictures of COCO's validation split:

```
kcm.evaluation.evaluate_sugarcrepe(model, "sugar-crepe/data", "val2017", tokenizer)
```

[CLIP_benchmark](https://github.com/LAION-AI/CLIP_benchmark) holds dozens of data sets with
their classes and templates. It judges a Keras model as it does open_clip's, by its own code:

```bash
pip install clip-benchmark
python -m keras_cluster_mask.interop.clip_benchmark eval --model my_clip \\
    --pretrained results/model.keras --tokenizer results/tokenizer.json \\
    --dataset wds/vtab/cifar10 --dataset_root "wds_cifar10" --output result.json
```

Weights of open_clip are judged in the same way, and those you have trained go back there:

```
backbone = kcm.interop.load_open_clip("open_clip_pytorch_model.safetensors")
model = kcm.ContrastiveModel.from_clip(backbone)
kcm.interop.save_open_clip(model, "mine.safetensors")
```
"""
