"""Processes that read batches in the background, in order."""

import contextlib
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import traceback

import cloudpickle
import numpy as np
from PIL import Image

# The environment variable by which `import keras_cluster_mask` knows a worker.
WORKER = "KERAS_CLUSTER_MASK_WORKER"


def in_processes(read, count, size, batches, stack):
    """Reads batches in worker processes, which take turns.

    The processes of grain and of `multiprocessing` wait for stalled storage when the
    program ends. These can be killed at any time, because the memory that they share
    with this process has no name.

    Args:
        read: Function of batches and a stack, as `Batches.in_threads`.
        count: Integer. The number of processes.
        size: Integer. The number of bytes of the images of a full batch.
        batches: Range. The numbers of the batches.
        stack: `contextlib.ExitStack`. Closing it ends the processes.

    Yields:
        The batches, in order.
    """
    context, workers = multiprocessing.get_context("spawn"), []
    for number in range(count):
        memory = context.RawArray("B", size)
        connection, other = context.Pipe()
        arguments = other, memory, batches[number::count]
        process = context.Process(target=_work, args=arguments, daemon=True)
        # A worker does not import Keras.
        os.environ[WORKER] = "1"
        try:
            process.start()
        finally:
            os.environ.pop(WORKER, None)
        other.close()
        stack.callback(process.join)
        stack.callback(process.kill)
        workers.append((process, connection, np.frombuffer(memory, "uint8")))
    # Unlike pickle, cloudpickle supports lambdas.
    content = cloudpickle.dumps((read, Image.MAX_IMAGE_PIXELS))
    for _, connection, _ in workers:
        # A worker that has ended is found below.
        with contextlib.suppress(OSError):
            connection.send_bytes(content)
    for _, (process, connection, images) in zip(batches, itertools.cycle(workers)):
        try:
            batch, shape = connection.recv()
        # With unread bytes, the connection is reset.
        except (EOFError, ConnectionResetError) as error:
            process.join()
            raise RuntimeError(
                "A worker process of `num_workers` ended unexpectedly, for example "
                "because memory ran out, or because the program has no `if __name__ == "
                f"'__main__':` guard. Received: exit code {process.exitcode}"
            ) from error
        if isinstance(batch, Exception):
            raise batch
        batch["images"] = images[: math.prod(shape)].reshape(shape).copy()
        # The worker may overwrite the images.
        connection.send(None)
        yield batch


def _work(connection, memory, batches):
    """Reads batches in a worker process, and sends them until the program ends."""
    os.environ.pop(WORKER, None)
    images = np.frombuffer(memory, "uint8")
    # After Ctrl-C, which all processes get, the program ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A program that is killed closes the connection.
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        try:
            # Pillow refuses large images, too.
            read, Image.MAX_IMAGE_PIXELS = connection.recv()
            for batch in read(batches, stack):
                found = batch.pop("images")
                images[: found.size] = found.ravel()
                connection.send((batch, found.shape))
                connection.recv()
        except Exception as error:
            # A pickle has no traceback.
            error.add_note(traceback.format_exc())
            try:
                pickle.loads(pickle.dumps(error))
            # Such as the error of a class that the program defines.
            except Exception:
                error = RuntimeError("".join(traceback.format_exception(error)))
            connection.send((error, ()))
