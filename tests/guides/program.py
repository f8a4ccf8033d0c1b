"""Runs a guide on the images of another folder.

python program.py GUIDE IMAGES
"""

import pathlib
import runpy
import sys

import keras_cluster_mask as kcm

ROOT = pathlib.Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    guide, images = sys.argv[1:]
    kcm.data.example_images = lambda: pathlib.Path(images)
    runpy.run_path(str(ROOT / guide), run_name="__main__")
