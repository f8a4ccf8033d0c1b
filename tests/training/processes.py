"""A tokenizer that a worker process loads without Keras."""

import os

import numpy as np


class NoteProcess:
    """Returns rows of ones, and leaves a file with the name of its process in a folder.

    Only for the captions of `write_pairs`, not for sentences that `fit` tries it on.

    Args:
        folder: `pathlib.Path`.
    """

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, captions):
        if captions[0].startswith("no "):
            (self.folder / str(os.getpid())).touch()
        return np.ones((len(captions), 6), "int32")
