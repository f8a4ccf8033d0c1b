"""Reads batches in a process of its own, until it is stopped.

    python worker_program.py SOURCE NUM_WORKERS TRAINING

It writes a file `ready` when it has the first batch. With `end` as a fourth argument it
ends then.
"""

import pathlib
import sys
import time

from keras_cluster_mask.data import image_text_dataset

if __name__ == "__main__":
    source, num_workers, training, *end = sys.argv[1:]
    dataset = image_text_dataset(
        source,
        None,
        16,
        8,
        training=training == "True",
        format="grain",
        num_workers=int(num_workers),
    )
    iterator = iter(dataset)
    next(iterator)
    pathlib.Path("ready").touch()
    for _ in () if end else iterator:
        time.sleep(1)
