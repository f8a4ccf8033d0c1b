"""Files of checkpoints: whole or not there, on any storage."""

import errno
import os
import threading

import ml_dtypes
import numpy as np
import pytest

from keras_cluster_mask.training import checkpoints
from keras_cluster_mask.training.checkpoints import (
    CheckpointFiles,
    finish_writing_everywhere,
    read_resumable,
)

pytestmark = pytest.mark.any_backend


def arrays(count=3):
    return {"array": np.arange(count)}


def test_a_file_gives_back_its_arrays_and_facts(tmp_path):
    written = {
        "half": np.arange(5).astype(ml_dtypes.bfloat16),
        "count": np.array(3, "int32"),
    }
    CheckpointFiles(tmp_path).write(written, {"epoch": 7, "note": "a"})
    path, found, facts = CheckpointFiles(tmp_path).read_last()
    assert path == str(tmp_path / "epoch-00007.npz")
    assert facts == {"epoch": 7, "note": "a"}
    assert found.keys() == written.keys()
    for key, value in written.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)


def test_a_checkpoint_is_written_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    # As on Windows.
    monkeypatch.delattr(os, "O_DIRECTORY")
    system_open = os.open

    def open_file(path, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return system_open(path, *args, **options)

    monkeypatch.setattr(os, "open", open_file)
    CheckpointFiles(tmp_path).write(arrays(), {"epoch": 1})
    _, found, facts = CheckpointFiles(tmp_path).read_last()
    assert facts["epoch"] == 1
    np.testing.assert_array_equal(found["array"], np.arange(3))


def test_reading_waits_for_what_is_being_written(tmp_path, monkeypatch):
    event, write = threading.Event(), CheckpointFiles.write

    def wait_and_write(self, *args):
        event.wait(60)
        return write(self, *args)

    monkeypatch.setattr(CheckpointFiles, "write", wait_and_write)
    path = str(tmp_path / "epoch-00001.npz")
    for read in (
        lambda: read_resumable(tmp_path)[0],
        lambda: read_resumable(path)[0],
        lambda: CheckpointFiles(tmp_path).paths()[-1],
        lambda: CheckpointFiles(tmp_path).read_last()[0],
    ):
        event.clear()
        CheckpointFiles(tmp_path).start_writing(arrays(), {"epoch": 1})
        timer = threading.Timer(0.2, event.set)
        timer.start()
        assert read() == path
        timer.join()
        os.remove(path)


def test_an_error_of_writing_in_another_process_stops_this_one(monkeypatch):
    monkeypatch.setattr(checkpoints, "all_gather_object", lambda value: [value, 1])
    with pytest.raises(OSError, match=r"must be written.*Received: an error in ano"):
        finish_writing_everywhere()


def test_a_storage_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"`resume_from`.*Received: resume_from="):
        read_resumable("nowhere://run")
