# %% [markdown]
# # Train from TFRecord files with tf.data
#
# `fit`, `evaluate` and `kcm.evaluation` take a `tf.data.Dataset` of batches
# `{"images": ..., "token_ids": ...}` on JAX, PyTorch and TensorFlow.
#
# This guide writes 3,223 captioned emoji and drawings to a TFRecord file, and trains a small CLIP on
# this file. On JAX, it takes about two minutes on two CPU cores, in batches of 64. Decoding, random
# crops and keras_hub's tokenizer run in the graph of `tf.data`. The library's own pipeline evaluates
# the model, and a table compares the speed of both pipelines.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import itertools
import time
from pathlib import Path

import keras
import keras_hub
import tensorflow as tf

import keras_cluster_mask as kcm

if keras.backend.backend() != "tensorflow":
    # TensorFlow only reads data here, but would allocate the memory of all GPUs.
    tf.config.set_visible_devices([], "GPU")

IMAGES = kcm.data.example_images()
TRAIN, TEST = IMAGES / "train-*.tar", IMAGES / "test-*.tar"
RESULTS = Path(os.environ.get("RESULTS", "results"))
IMAGE_SIZE, CONTEXT_LENGTH, BATCH_SIZE = 48, 12, 64
EPOCHS = int(os.environ.get("EPOCHS", 8))
KEYS = "jpg", "txt"  # The fields of a record.

RESULTS.mkdir(parents=True, exist_ok=True)
keras.utils.set_random_seed(1)  # Also the seed of `tf.data`.

# %% [markdown]
# ## Write a TFRecord file
#
# A record contains the bytes of a JPEG file, and a caption. The drawings have transparent
# backgrounds, which `image_text_dataset` makes white.


# %%
def write_records(name, pairs):
    """Writes pairs of image bytes and caption bytes to a file; returns its path."""
    path = str(RESULTS / name)
    with tf.io.TFRecordWriter(path) as writer:
        for pair in pairs:
            lists = {k: tf.train.BytesList(value=[v]) for k, v in zip(KEYS, pair)}
            row = {k: tf.train.Feature(bytes_list=v) for k, v in lists.items()}
            features = tf.train.Features(feature=row)
            writer.write(tf.train.Example(features=features).SerializeToString())
    return path


def drawings(source):
    batches = kcm.data.image_text_dataset(
        source, None, 64, BATCH_SIZE, training=False, include_captions=True
    )
    for batch in batches:
        for image, captions in zip(batch["images"], batch["captions"]):
            yield tf.io.encode_jpeg(image, quality=95).numpy(), captions[0].encode()


records = write_records("train.tfrecord", drawings(TRAIN))

# %% [markdown]
# ## Model and tokenizer
#
# The tokenizer is trained on the captions, and saved with the model. `save_to_preset` writes it for
# keras_hub, whose `CLIPTokenizer` runs in the graph.
#
# keras_hub's tokenizer does not clean captions, and may split numbers differently from CLIP. If your
# token ids differ, set `model.tokenizer = preprocessor`, so that evaluation tokenizes as training.

# %%
captions = kcm.data.read_captions(TRAIN)
tokenizer = kcm.data.CLIPTokenizer.train(captions, 3000, CONTEXT_LENGTH)
backbone = kcm.models.clip_backbone(
    "tiny", IMAGE_SIZE, tokenizer.vocabulary_size, CONTEXT_LENGTH, patch_size=8
)
model = kcm.ContrastiveModel.from_backbone(
    backbone, masking=kcm.RandomMasking(0.5), tokenizer=tokenizer
)
model.compile(kcm.small_data_optimizer(EPOCHS, len(captions) // BATCH_SIZE, 1.5e-3))

preset = str(RESULTS / "untrained")
model.save_to_preset(preset)
preprocessor = keras_hub.models.CLIPPreprocessor(
    keras_hub.models.CLIPTokenizer.from_preset(preset), sequence_length=CONTEXT_LENGTH
)


def tokenize(texts):
    return preprocessor({"images": None, "prompts": texts})["token_ids"]


token_ids = keras.ops.convert_to_numpy(tokenize(tf.constant(captions)))
different = (token_ids != tokenizer(captions)).any(axis=1).sum()
print(f"{different} of {len(captions)} captions have other token ids in keras_hub")

# %% [markdown]
# ## A pipeline in the graph
#
# Images stay uint8, and the model normalizes them on the device. The dataset is finite, so an epoch
# is one pass over it, in a new order. An endless dataset (`.repeat()`) needs
# `fit(..., steps_per_epoch=...)`. All batches should have the same size (`drop_remainder=True`),
# because the loss depends on the number of captions in a batch.


# %%
def crop(record, size):
    """Returns a random crop of the image of a record, and the caption."""
    row = tf.io.parse_single_example(
        record, {key: tf.io.FixedLenFeature([], tf.string) for key in KEYS}
    )
    shape, whole = tf.image.extract_jpeg_shape(row["jpg"]), [[[0.0, 0.0, 1.0, 1.0]]]
    box = tf.image.sample_distorted_bounding_box(shape, whole, area_range=(0.5, 1.0))
    window = tf.concat([box.begin[:2], box.size[:2]], axis=0)
    image = tf.image.decode_and_crop_jpeg(row["jpg"], window, channels=3)
    image = tf.image.resize(image, (size, size), "bicubic", antialias=True)
    image = tf.image.random_flip_left_right(tf.round(image))
    return tf.saturate_cast(image, "uint8"), row["txt"]


def read_records(path, count, size):
    return (
        tf.data.TFRecordDataset(path)
        .shuffle(count)
        .map(lambda record: crop(record, size), tf.data.AUTOTUNE)
        .batch(BATCH_SIZE, drop_remainder=True)
        .map(lambda images, txt: {"images": images, "token_ids": tokenize(txt)})
        .apply(tf.data.experimental.assert_cardinality(count // BATCH_SIZE))
        .prefetch(2)
    )


# %% [markdown]
# ## Train and evaluate
#
# Evaluation uses `image_text_dataset`, whose center crops equal open_clip's, pixel by pixel. The
# saved model includes its tokenizer and image size.

# %%
train = read_records(records, len(captions), IMAGE_SIZE)
model.fit(train, epochs=EPOCHS, verbose=2)
model.save(RESULTS / "tf_data.keras")

recall = kcm.evaluation.evaluate_retrieval(RESULTS / "tf_data.keras", TEST, verbose=0)
chance = recall.pop("chance")
for name, value in recall.items():
    print(f"{name:25} {value:6.1%}   chance {chance[name]:5.1%}")

# %% [markdown]
# ## Which pipeline?
#
# The table compares the speed on the same photographs at 224 pixels, with crops and tokenizing.

# %%
files = sorted((IMAGES.parent / "photographs").glob("*.jpg")) * 200
photographs = [(path.read_bytes(), path.stem.encode()) for path in files]
records = write_records("photographs.tfrecord", photographs)
folder = RESULTS / "photographs"
folder.mkdir(exist_ok=True)
for number, pair in enumerate(photographs):
    for key, content in zip(KEYS, pair):
        (folder / f"{number}.{key}").write_bytes(content)


def images_per_second(batches, count=50):
    """Measures the speed after the first three batches."""
    batches = itertools.islice(batches, 3 + count)
    starts = [time.perf_counter() for _ in batches][2:]
    return BATCH_SIZE * count / (starts[-1] - starts[0])


own = kcm.data.image_text_dataset(folder, tokenizer, 224, crop_scale=(0.5, 1.0))
in_graph = read_records(records, len(files), 224).repeat()
print("pipeline             images per second")
for name, batches in {"image_text_dataset": own, "tf.data": in_graph}.items():
    print(f"{name:20} {images_per_second(batches):17.0f}")

# %% [markdown]
# Prefer `image_text_dataset` for tar files, Parquet files, tables and folders. Its pixels equal
# Pillow's, and its token ids equal CLIP's. Batches are the same for any number of processes, a run
# resumes at any batch without reading the earlier ones, and broken samples are replaced.
#
# Prefer `tf.data` for TFRecord files, and for augmentation that is written in TensorFlow. Its
# threads do not share Python's global interpreter lock, so one process can use many cores.
# `image_text_dataset` uses [worker processes](../docs/how_to/large_data.md) instead. On two cores,
# the antialiased bicubic resize takes about half of the time of `tf.data`. Bilinear resizing is
# faster. If you train with several processes, each process must read its own rows: add
# `.shard(processes, index)`.
