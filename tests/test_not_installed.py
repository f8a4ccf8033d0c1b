"""The library works without TensorFlow, on JAX and torch, and without its extras."""

import keras
import pytest

from tests.helpers import run_program

pytestmark = pytest.mark.slow

TENSORFLOW = "tensorflow,tensorflow_text"
# The packages of `faiss`, `heic`, `parquet` and `weights`.
EXTRAS = "pillow_heif,pyarrow,faiss,safetensors"


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
    shard = write_pairs("a.tar", 0, 20)
    printed = run_without(TENSORFLOW, "tests/programs/all_rooms.py", shard)
    assert {"history.png", "masks.png"} <= {x.name for x in tmp_path.iterdir()}
    # What needs TensorFlow says so.
    assert "refused: `as_dataset` needs TensorFlow" in printed
    assert "intact: 1" in printed
    assert "['no 0', 'no 1']" in printed
