"""Reads batches in a process of its own, until it is stopped.

    python worker_program.py SOURCE NUM_WORKERS [end|stop]

It prints which backends are imported where samples are read, and writes a file `ready`
when it has the first batch. With `end` it ends then. With `stop`, each worker stops
while it starts. Reads of a source at `stalling://` stall while there is a file `stall`.
"""

import os
import pathlib
import signal
import sys
import threading
import time

import fsspec
from fsspec.implementations.local import LocalFileSystem

from keras_cluster_mask.data import image_text_dataset


class Stalling(LocalFileSystem):
    protocol = "stalling"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("stalling://"))

    def unstrip_protocol(self, name):
        return f"stalling://{self._strip_protocol(name)}"

    def cat_file(self, path, start=None, end=None, **options):
        if os.path.exists("stall"):
            pathlib.Path("stalled").touch()
            threading.Event().wait()
        return super().cat_file(path, start, end, **options)


fsspec.register_implementation("stalling", Stalling)


def imported(texts):
    names = "keras", "torch", "tensorflow"
    return [[int(name in sys.modules) for name in names]] * len(texts)


if __name__ == "__mp_main__" and sys.argv[3:] == ["stop"]:
    pathlib.Path("ready").touch()
    os.kill(os.getpid(), signal.SIGSTOP)

if __name__ == "__main__":
    source, num_workers, *end = sys.argv[1:]
    options = dict(training=True, num_workers=int(num_workers))
    iterator = iter(image_text_dataset(source, imported, 16, 8, **options))
    print("imported:", next(iterator)["token_ids"][0].tolist())
    pathlib.Path("ready").touch()
    for _ in () if end == ["end"] else iterator:
        time.sleep(0.1)
