"""A tokenizer that a worker process loads without Keras."""

import os

import numpy as np


class NoteProcess:
    """Returns rows of ones, and leaves a file with the name of its process in a folder.

    Args:
        folder: `pathlib.Path`.
    """

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, captions):
        (self.folder / str(os.getpid())).touch()
        return np.ones((len(captions), 6), "int32")
