"""Ends while a checkpoint is being written to a folder: python slow_write.py FOLDER."""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from keras_cluster_mask.training.checkpoints import CheckpointFiles


class Slow(CheckpointFiles):
    def write(self, *args):
        time.sleep(1)
        super().write(*args)


Slow(sys.argv[1]).start_writing({"array": np.arange(3)}, {"epoch": 1})
