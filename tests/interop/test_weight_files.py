"""Files of weights: reading, writing and refusals."""

import os
import pathlib
import sys

import numpy as np
import pytest

from keras_cluster_mask.interop import load_open_clip
from keras_cluster_mask.interop.weight_files import read_weights, write_weights
from tests.helpers import assert_same_values
from tests.interop.open_clip_models import load

pytestmark = pytest.mark.any_backend

ARRAYS = {
    "matrix": np.arange(6, dtype="float32").reshape(2, 3),
    "number": np.array(0.5, "float32"),
}


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("sprung"),)


@pytest.fixture
def without_torch(monkeypatch):
    """As if torch were not installed."""
    for name in [x for x in sys.modules if x.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)


def write_torch(path, arrays):
    import torch

    torch.save({name: torch.tensor(x) for name, x in arrays.items()}, path)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".safetensors", write_weights),
        *((suffix, write_torch) for suffix in (".pt", ".pth", ".bin")),
    ],
)
def test_files_of_both_libraries_are_read(tmp_path, suffix, write):
    path = tmp_path / f"weights{suffix}"
    write(path, ARRAYS)
    found = read_weights(path)
    assert_same_values(found, ARRAYS)
    assert found["number"].shape == ()


def test_safetensors_need_no_torch(tmp_path, without_torch):
    write_weights(tmp_path / "a.safetensors", ARRAYS)
    found = read_weights(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(found["matrix"], ARRAYS["matrix"])
    with pytest.raises(ImportError, match=r"pip install torch.*b\.pt"):
        read_weights(tmp_path / "b.pt")


def test_files_of_safetensors_say_what_they_need(tmp_path, monkeypatch):
    write_weights(tmp_path / "a.safetensors", ARRAYS)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install safetensors.*a\.safetensors"):
        read_weights(tmp_path / "a.safetensors")
    with pytest.raises(ImportError, match=r"pip install safetensors.*b\.safetensors"):
        write_weights(tmp_path / "b.safetensors", ARRAYS)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(3)}, "args": Trap()}, "trap.pt")
    with pytest.raises(ValueError, match=r"can run any code.*If you trust.*'trap.pt'"):
        load("trap.pt")
    assert not os.path.exists("sprung")


@pytest.mark.parametrize("version", ["2.5.1+cpu", "2.9.1", "1.13.0"])
def test_a_torch_whose_reader_is_not_safe_reads_nothing(tmp_path, monkeypatch, version):
    import torch

    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(
        ImportError, match=rf"pip install -U torch.*a\.pt.*{version[:3]}"
    ):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("suffix", "write"), [(".safetensors", write_weights), (".pt", write_torch)]
)
def test_a_damaged_file_or_one_of_another_kind_cannot_be_read(tmp_path, suffix, write):
    path = tmp_path / f"weights{suffix}"
    write(path, {"a": np.zeros(1000, "float32")})
    content = path.read_bytes()
    cut = [content[: int(share * len(content))] for share in (0.0, 0.5, 0.99)]
    for damaged in (*cut, b"hello world" * 9, b"\x80\x02}", b"PK\x03\x04"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"`source` cannot be read: .*weights"):
            read_weights(path)


def test_bad_paths_are_refused_by_name():
    with pytest.raises(FileNotFoundError, match=r"`source`.*Received: source='none.pt"):
        load_open_clip("none.pt")
    with pytest.raises(ValueError, match=r"`source` must end in .*source='a.h5'"):
        read_weights(pathlib.Path("a.h5"))
    with pytest.raises(ValueError, match=r"`path` must end in .*path='a.pt'"):
        write_weights(pathlib.Path("a.pt"), ARRAYS)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_weights(path, ARRAYS)
    before = path.read_bytes()
    with pytest.raises((TypeError, AttributeError)):
        write_weights(path, {**ARRAYS, "other": object()})
    write_bytes = pathlib.Path.write_bytes

    def write_half(path, content):
        write_bytes(path, content[: len(content) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space"):
        write_weights(path, {"matrix": np.zeros(9, "float32")})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
