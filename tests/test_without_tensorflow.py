"""On a machine with JAX or torch alone the library imports and trains."""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]

BLOCK = """
import sys


class Without:
    "Finds what a finder finds except tensorflow, as if it were not installed."

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_text"):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
try:
    import tensorflow
except ImportError:
    pass
else:
    raise SystemExit("tensorflow was to be blocked")
"""

TRAIN = """
import keras
import keras_hub
import numpy as np

import keras_cluster_mask as kcm

rng = np.random.default_rng(0)
pairs = {
    "images": rng.integers(0, 256, size=(4, 8, 8, 3)).astype("uint8"),
    "token_ids": rng.integers(1, 30, size=(4, 6)).astype("int32"),
}


def check(model, callbacks=()):
    model.compile(optimizer="adam")
    history = model.fit(pairs, batch_size=4, verbose=0, callbacks=[*callbacks]).history
    assert np.isfinite(history["loss"]).all(), history
    found = model.predict(pairs, verbose=0)
    assert found["image_embeddings"].shape[0] == 4
    return history


images = keras.Input((8, 8, 3))
x = keras.layers.Reshape((4, 8))(keras.layers.Conv2D(8, 4, strides=4)(images))
x = keras.layers.Dense(8, name="embedded")(x)
x = keras.layers.Dense(8)(keras.layers.GlobalAveragePooling1D()(x))
encoder = kcm.with_masking(
    keras.Model(images, x), kcm.ClusterMasking(4), layer="embedded"
)
ids = keras.Input((6,), dtype="int32")
y = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(30, 8)(ids))
history = check(kcm.ContrastiveModel(encoder, keras.Model(ids, y)))
assert history["mask_ratio"] == [0.5]

size = dict(hidden_dim=8, num_layers=1, num_heads=2, intermediate_dim=16)
backbone = keras_hub.models.CLIPBackbone(
    keras_hub.models.CLIPVisionEncoder(patch_size=4, image_shape=(8, 8, 3), **size),
    keras_hub.models.CLIPTextEncoder(30, 8, max_sequence_length=6, **size),
    projection_dim=8,
)
history = check(kcm.ContrastiveModel.from_backbone(backbone, kcm.ClusterMasking(4)))
assert history["mask_ratio"] == [0.5]
callbacks = [kcm.callbacks.Retrieval(pairs)]
model = kcm.ContrastiveModel.from_backbone(backbone, kcm.ClusterMasking(4))
history = check(model, callbacks)
assert len(history["val_image_to_text_recall@1"]) == 1
kcm.interop.save_open_clip(backbone, "FOLDER/clip.safetensors")
again = kcm.interop.load_open_clip("FOLDER/clip.safetensors")
for old, new in zip(backbone.weights, again.backbone.weights):
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (old, new)))
found = kcm.masking.masking_statistics(kcm.ClusterMasking(4), pairs, verbose=0)
assert found.keep_ratio.tolist() == [0.5] * 4
assert "tensorflow" not in sys.modules
print("trained")
"""

ROOMS = """
import os
import sys

import keras
import keras_hub
import numpy as np

import keras_cluster_mask as kcm

os.chdir("FOLDER")
names = ["cat", "dog"]
tokenizer = kcm.data.CLIPTokenizer.train(names, 600, context_length=8)
backbone = kcm.models.clip_backbone(
    "tiny", 16, tokenizer.vocabulary_size, context_length=8
)
backbone = kcm.models.with_image_size(backbone, 32)
backbone = kcm.models.with_context_length(backbone, 6)
tokenizer = tokenizer.with_context_length(6)
masking = kcm.AttentiveMasking(kcm.models.MomentumEncoder(backbone.vision_encoder))
model = kcm.ContrastiveModel.from_backbone(backbone, masking)
model.compile("adam", log_gradient_norm=True)
rng = np.random.default_rng(0)
labels = np.arange(8) % 2
images = rng.integers(0, 256, size=(8, 32, 32, 3)).astype("uint8")
pairs = {"images": images, "token_ids": tokenizer([names[x] for x in labels])}
classes = (images, labels)
fit = dict(batch_size=4, verbose=0, resume_from="run")
callbacks = [
    kcm.callbacks.Throughput(),
    kcm.callbacks.ZeroShot(classes, names, tokenizer),
    kcm.callbacks.Checkpoint("run"),
]
model.fit(pairs, callbacks=callbacks, **fit)
history = model.fit(pairs, epochs=2, **fit)
assert len(history.history["loss"]) == 2
kcm.visualization.plot_history(history).savefig("history.png")
statistics = kcm.masking.masking_statistics(kcm.ClusterMasking(8), images, verbose=0)
kcm.visualization.plot_masking_statistics(statistics).savefig("statistics.png")

model.save("model.keras")
model.text_tower.save("tower.keras")
loaded = keras.saving.load_model("model.keras")
before, after = (x.predict(pairs, verbose=0) for x in (model, loaded))
for key, values in before.items():
    np.testing.assert_array_equal(values, after[key])
probe = kcm.evaluation.evaluate_linear_probe(
    "model.keras", classes, classes, regularization=1.0, verbose=0
)
assert 0 <= probe["top_1"] <= 1
assert kcm.evaluation.embed_texts(loaded, names, tokenizer, verbose=0).shape == (2, 96)
kcm.interop.save_open_clip(model, "clip.safetensors")
assert kcm.distribution.is_main_process() and kcm.distribution.num_replicas() == 1

dataset = kcm.data.image_text_dataset(
    "PAIRS",
    tokenizer,
    32,
    4,
    training=True,
    text_masking=kcm.data.RandomTextMasking(),
    sampling=kcm.data.Sampling({f"{i:04}": 0.6 for i in range(20)}),
)
held_out = kcm.data.image_text_dataset("PAIRS", tokenizer, 32, 4, training=False)
model = kcm.ContrastiveModel.from_backbone(backbone, loss="sigmoid", micro_batch_size=2)
model.compile("adam")
history = model.fit(dataset, validation_data=held_out, verbose=0)
assert len(history.history["val_loss"]) == 1
assert model.predict(held_out, verbose=0)["text_embeddings"].shape == (20, 96)
assert "tensorflow" not in sys.modules
print("trained")
"""

DATA = """
import pathlib
import tempfile

from PIL import Image

import keras_cluster_mask as kcm

try:
    kcm.data.image_text_dataset(
        "PAIRS", lambda texts: [[1]] * len(texts), 8, 2, training=False, format="tf"
    )
except ImportError as error:
    print("refused:", error)

with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,caption\\na.png,black\\n")
    print("intact:", kcm.data.check(folder)["samples"])

print(kcm.data.read_captions("RECORDS"))
"""

STEP_TIME = """
import sys

sys.path.insert(0, "BENCHMARKS")
import step_time

options = "--size tiny --image-size 32 --batch-size 2 --methods none --rounds 1"
sys.argv = ["step_time.py", *options.split(), "--results", "FOLDER"]
step_time.main()
assert "tensorflow" not in sys.modules
"""


# TensorFlow as the backend is out of question here.
not_on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="runs on the other backends"
)


def run(code):
    """Runs code where tensorflow cannot be imported, and returns what it prints."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.fail(done.stderr[-3000:])
    return done.stdout


@not_on_tensorflow
def test_models_train_from_arrays(tmp_path):
    assert "trained" in run(TRAIN.replace("FOLDER", str(tmp_path)))


@not_on_tensorflow
def test_all_rooms_work(tmp_path, write_pairs):
    code = ROOMS.replace("PAIRS", str(write_pairs("a.tar", 0, 20)))
    assert "trained" in run(code.replace("FOLDER", str(tmp_path)))
    assert {"history.png", "statistics.png"} <= {x.name for x in tmp_path.iterdir()}


@pytest.mark.any_backend
def test_steps_are_timed(tmp_path):
    code = STEP_TIME.replace("BENCHMARKS", str(ROOT / "benchmarks"))
    assert "| none |" in run(code.replace("FOLDER", str(tmp_path)))


@pytest.mark.any_backend
def test_data_is_checked_and_read(tmp_path, write_pairs):
    records = tmp_path / "a.tfrecord"
    write_tfrecord(records)
    code = DATA.replace("PAIRS", str(write_pairs("a.tar", 0, 2)))
    printed = run(code.replace("RECORDS", str(records)))
    # What needs TensorFlow says so.
    assert "refused: `format='tf'` needs TensorFlow" in printed
    assert "use `format='grain'`" in printed
    assert "intact: 1" in printed
    assert "['no 1', 'no 2']" in printed


def write_tfrecord(path):
    tf = pytest.importorskip("tensorflow")

    def feature(value):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for number in (1, 2):
            values = {"image": feature(b"0"), "caption": feature(b"no %d" % number)}
            features = tf.train.Features(feature=values)
            writer.write(tf.train.Example(features=features).SerializeToString())
