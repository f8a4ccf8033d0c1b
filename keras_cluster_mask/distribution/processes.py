"""The processes of one training run."""

import atexit
import datetime
import functools
import os

import keras
from keras import ops

from keras_cluster_mask.distribution.replicas import num_replicas, verbosity

# Seconds without a heartbeat after which JAX gives up a process, and seconds that torch
# waits for other processes, which may be writing or filling a buffer. torch notices a
# process that has died at once, as the connection breaks.
HEARTBEAT, TIMEOUT = 25, 600


def initialize() -> None:
    """Joins the processes of one training run, at the start of the program.

    On torch, start the program with `torchrun` and one process per GPU. Each process
    uses the GPU of its local rank, or the CPU if there is none. On JAX this calls
    `keras.distribution.initialize`, which reads the environment variables
    `KERAS_DISTRIBUTION_JOB_ADDRESSES`, `_NUM_PROCESSES` and `_PROCESS_ID`. Afterwards,
    set a `keras.distribution.DataParallel(auto_shard_dataset=False)`. If a process
    dies, the others end with an error within a minute.

    Raises:
        RuntimeError: On TensorFlow, or on torch outside of `torchrun`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        # Keras does not pass a timeout, and JAX's default makes the others wait longer.
        join = jax.distributed.initialize
        jax.distributed.initialize = functools.partial(
            join, heartbeat_timeout_seconds=HEARTBEAT
        )
        try:
            keras.distribution.initialize()
        finally:
            jax.distributed.initialize = join
        return
    if backend != "torch":
        raise RuntimeError(
            "`initialize` supports JAX and torch only. With TensorFlow, train on "
            "several devices in one process: `tf.distribute.MirroredStrategy`. "
            f"Received: backend={backend!r}"
        )
    if "WORLD_SIZE" not in os.environ:
        raise RuntimeError(
            "`initialize` needs the environment variables that `torchrun` sets: start "
            "the program with `torchrun --nproc-per-node=NUMBER program.py`. Received: "
            "no environment variable WORLD_SIZE"
        )
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=TIMEOUT)
    )
    if not cuda:
        atexit.register(_leave)


def _leave():
    """Ends the threads of gloo, which would otherwise abort a process that exits."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_gather_object(value):
    """Gathers the values of all processes in a list; waits for all processes."""
    if keras.backend.backend() == "torch" and num_replicas() > 1:
        from torch import distributed

        values = [None] * num_replicas()
        distributed.all_gather_object(values, value)
        return values
    if keras.backend.backend() == "jax":
        import jax

        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(value).tolist()
    return [value]


def to_numpy(variable):
    """Returns the full value of a variable, even if it is sharded over devices.

    It is an array for a file of NumPy: float32 for bfloat16, which such files lack.
    """
    if keras.backend.backend() == "jax" and not variable.value.is_fully_addressable:
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(variable.value, tiled=True)
    else:
        value = ops.convert_to_numpy(variable)
    return value.astype("float32") if value.dtype.name == "bfloat16" else value


def progress_bar(
    total: int | None, verbose: str | int, unit_name: str
) -> keras.utils.Progbar:
    """Returns a progress bar, which only the main process shows."""
    return keras.utils.Progbar(
        total, verbose=verbosity(bool(verbose)), unit_name=unit_name
    )
