"""What `distribution` does and says in a single process."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.distribution import replicas
from tests.helpers import tiny_clip, tiny_metaclip, tiny_siglip

BACKEND = keras.backend.backend()


def layout_map(**axes):
    """The layout map of a mesh of two devices with these axes."""
    shape, names = (*axes.values(),), [*axes]
    mesh = keras.distribution.DeviceMesh(shape, names, ["cpu:0", "cpu:1"])
    return kcm.models.clip_layout_map(mesh)


@pytest.mark.any_backend
def test_the_layout_does_not_depend_on_the_names_of_encoders():
    layouts = layout_map(batch=1, model=2)
    for prefix in ("", "vision_encoder_"):
        found = layouts[f"{prefix}encoder_block_11/attention/query/kernel"]
        assert found.axes == (None, "model", None)
    assert layouts["vision_encoder_layer_norm/gamma"] is None


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [tiny_clip, tiny_metaclip, tiny_siglip])
def test_all_matrices_of_attention_and_mlps_have_a_layout(make):
    layouts = layout_map(batch=1, model=2)
    # SigLIP pools images by another attention, with an MLP.
    paths = [v.path for v in make().weights if v.path.endswith("kernel")]
    paths = [path for path in paths if "block" in path or "_head/a" in path]
    assert len(paths) == (16 if make is tiny_siglip else 12)
    assert all(layouts[path] is not None for path in paths)


@pytest.mark.any_backend
def test_a_mesh_without_the_axis_of_the_model_is_an_error():
    with pytest.raises(ValueError, match=r"`axis` must be.*'batch'.*axis='model'"):
        layout_map(batch=2)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras reads JAX's variables.")
def test_joining_processes_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    wanted = "torchrun" if BACKEND == "torch" else "MirroredStrategy"
    with pytest.raises(RuntimeError, match=rf"{wanted}.*Received: "):
        kcm.distribution.initialize()


def test_alone_there_is_one_replica_that_has_everything():
    assert kcm.distribution.num_replicas() == 1
    assert replicas.replica_index() == 0
    assert kcm.distribution.is_main_process()
    rows = np.ones((3, 2), "float32")
    for function in (
        replicas.all_gather,
        replicas.local_rows,
        replicas.local_loss,
        replicas.replica_mean,
    ):
        assert function(rows) is rows
