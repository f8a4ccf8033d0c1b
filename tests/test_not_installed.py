"""The library works without TensorFlow, on JAX and torch, and without its extras."""

import keras
import pytest

from tests.helpers import run_program

pytestmark = pytest.mark.slow

TENSORFLOW = "tensorflow,tensorflow_text"
# The packages of `parquet`, `probe`, `search`, `tfrecord` and `weights`.
EXTRAS = "pyarrow,sklearn,faiss,google_crc32c,safetensors"


def run_without(packages, program, *arguments):
    return run_program("tests/programs/hide.py", packages, program, *arguments)


def test_models_train_without_any_extra(write_pairs):
    # On TensorFlow it is needed as the backend.
    on_tensorflow = keras.backend.backend() == "tensorflow"
    packages = EXTRAS if on_tensorflow else f"{TENSORFLOW},{EXTRAS}"
    shard = write_pairs("a.tar", 0, 16)
    run_without(packages, "tests/programs/without_extras.py", shard)


@pytest.mark.any_backend
@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="runs on the other backends"
)
def test_all_rooms_work_without_tensorflow(tmp_path, write_pairs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard, records = write_pairs("a.tar", 0, 20), tmp_path / "a.tfrecord"
    write_tfrecord(records)
    printed = run_without(TENSORFLOW, "tests/programs/all_rooms.py", shard, records)
    assert {"history.png", "statistics.png"} <= {x.name for x in tmp_path.iterdir()}
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
