"""Files of checkpoints, on any storage."""

import ml_dtypes
import numpy as np
import pytest

from keras_cluster_mask.training.checkpoints import CheckpointFiles, read_resumable

pytestmark = pytest.mark.any_backend


def test_a_file_gives_back_its_arrays_and_facts(tmp_path):
    written = {
        "half": np.arange(5).astype(ml_dtypes.bfloat16),
        "count": np.array(3, "int32"),
    }
    CheckpointFiles(tmp_path).write(written, {"epoch": 7, "note": "a"})
    path, found, facts = read_resumable(tmp_path)
    assert path == str(tmp_path / "epoch-00007.npz")
    assert facts == {"epoch": 7, "note": "a"}
    assert found.keys() == written.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(found[key], value)


def test_a_storage_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"`resume_from`.*Received: resume_from="):
        read_resumable("nowhere://run")


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_a_saved_model_is_no_checkpoint(tmp_path, name):
    with pytest.raises(ValueError, match=rf"`resume_from`.*Received: .*{name}"):
        read_resumable(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"PK cut off", b"{}"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "epoch-00002.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"remove this file.*Received: .*00002.npz"):
        read_resumable(tmp_path)
