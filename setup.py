"""Adds the images of `datasets/` to the wheel; all else stands in pyproject.toml."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithImages(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            for pattern in ("images/*.tar", "photographs/*.jpg"):
                for file in pathlib.Path("datasets").glob(pattern):
                    target = pathlib.Path(self.build_lib, "keras_cluster_mask", file)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, target)


setup(cmdclass={"build_py": BuildWithImages})
