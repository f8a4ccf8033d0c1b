"""What the tests of all guides need: a small shard, and a guide run as a program."""

import itertools
import os
import pathlib
import subprocess
import sys

import keras
import pytest

from keras_cluster_mask.data.sources import read_samples

ROOT = pathlib.Path(__file__).parents[2]
PICTURES = ROOT / "datasets" / "pictures" / "test-00000.tar"


@pytest.fixture
def shard(write_tar):
    """The first 64 of the held-out images."""
    samples = itertools.islice(read_samples(PICTURES), 64)
    return write_tar(
        "pictures.tar",
        [
            (f"{sample['__key__']}.{name}", content)
            for sample in samples
            for name, content in sample.items()
            if name != "__key__"
        ],
    )


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
