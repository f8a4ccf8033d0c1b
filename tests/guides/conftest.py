"""Shared by the tests of the guides: a small shard, and a guide run as a program."""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.pairs import PairReader

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = ROOT / "datasets" / "images" / "test-00000.tar"


@pytest.fixture
def shard(write_tar):
    """The first 64 held-out images."""
    files = []
    for pair in open_index(IMAGES, PairReader()).read(range(64)):
        files.append((f"{pair.key}.webp", pair.image))
        files.append((f"{pair.key}.txt", pair.captions[0].encode()))
    return write_tar("images.tar", files)


@pytest.fixture
def run_guide(tmp_path):
    """Runs a guide with settings, its results in `tmp_path`; returns what it prints."""

    def run_guide(name, **settings):
        done = subprocess.run(
            [sys.executable, ROOT / "guides" / name],
            env={
                **os.environ,
                **settings,
                "KERAS_BACKEND": keras.backend.backend(),
                "RESULTS": str(tmp_path / "results"),
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run_guide
