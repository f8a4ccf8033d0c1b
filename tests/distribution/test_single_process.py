"""What `distribution` does and says in a single process."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.distribution import replicas

BACKEND = keras.backend.backend()


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
