"""Files of checkpoints, on any storage."""

import pytest

from keras_cluster_mask.training.checkpoints import resume

pytestmark = pytest.mark.any_backend


def test_a_storage_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"`resume_from`.*Received: resume_from="):
        resume(None, None, "nowhere://run", verbose=0)


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_a_saved_model_is_no_checkpoint(tmp_path, name):
    with pytest.raises(ValueError, match=rf"`resume_from`.*Received: .*{name}"):
        resume(None, None, tmp_path / name, verbose=0)


@pytest.mark.parametrize("content", [b"", b"PK cut off", b"{}"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "epoch-00002.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"remove this file.*Received: .*00002.npz"):
        resume(None, None, tmp_path, verbose=0)
