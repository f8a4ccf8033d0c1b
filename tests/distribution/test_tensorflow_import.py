import os
import subprocess
import sys

import pytest

from keras_cluster_mask.distribution.tensorflow_import import without_start_messages

pytestmark = pytest.mark.any_backend

FIRST = b"WARNING: All log messages before absl::InitializeLog() is called\n"
INFORMATION = b"I0000 00:00:1795786387.016646   28706 port.cc:153] oneDNN is on.\n"
WARNING = b"W0000 00:00:1795786387.016646   28706 gpu.cc:1] No driver.\n"
OTHER = b"Importing\n"


def write(error=None):
    os.write(2, FIRST + INFORMATION + WARNING + OTHER)
    if error:
        raise error


def test_information_is_kept_off_and_all_else_is_shown(capfd):
    with without_start_messages():
        write()
    os.write(2, INFORMATION)
    assert capfd.readouterr().err.encode() == WARNING + OTHER + INFORMATION


def test_an_error_passes_and_what_was_written_is_shown(capfd):
    with pytest.raises(ZeroDivisionError), without_start_messages():
        write(ZeroDivisionError())
    assert capfd.readouterr().err.encode() == WARNING + OTHER


def test_all_is_shown_if_that_is_asked_for(capfd, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    with without_start_messages():
        write()
    assert capfd.readouterr().err.encode() == FIRST + INFORMATION + WARNING + OTHER


def test_a_program_without_stderr_goes_on(monkeypatch):
    def closed(descriptor):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "dup", closed)
    with without_start_messages():
        pass


def test_triton_is_imported_before_tensorflow(tmp_path):
    # The other way around, the real one ends the program.
    stand_in = "import sys; print('tensorflow' in sys.modules, end='')"
    (tmp_path / "triton.py").write_text(stand_in)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    module = "keras_cluster_mask.distribution.tensorflow_import"
    done = subprocess.run(
        [sys.executable, "-c", f"import {module} as first; first.import_keras_hub()"],
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False"
