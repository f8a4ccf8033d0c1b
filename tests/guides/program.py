"""Runs guides, one after another, on the images of another folder.

python program.py IMAGES GUIDE ...
"""

import pathlib
import runpy
import sys

import keras_cluster_mask as kcm

ROOT = pathlib.Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    images, *guides = sys.argv[1:]
    kcm.data.example_images = lambda: pathlib.Path(images)
    for guide in guides:
        print("# The next guide")
        runpy.run_path(str(ROOT / "guides" / f"{guide}.py"), run_name="__main__")
