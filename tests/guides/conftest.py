"""Shared by the tests of the guides: a guide run as a program, with little training."""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run_guide():
    """Runs a guide with its results in a folder; returns what it prints."""

    def run_guide(name, results, **settings):
        done = subprocess.run(
            [sys.executable, ROOT / "guides" / name],
            env={
                **os.environ,
                **settings,
                "EPOCHS": "1",
                "KERAS_BACKEND": keras.backend.backend(),
                "MPLBACKEND": "agg",
                "RESULTS": str(results),
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run_guide


@pytest.fixture(scope="session")
def pretrained(run_guide, tmp_path_factory):
    """The folder of results of the first guide, and what it printed."""
    folder = tmp_path_factory.mktemp("pretrained")
    return folder, run_guide("pretrain_clip.py", folder)
