"""Shared by the tests of the guides: a guide run as a program, with little training."""

import pytest

from tests.helpers import run_program


@pytest.fixture(scope="session")
def run_guide(few_images):
    """Runs a guide on few images, with its results in a folder; returns its output."""

    def run_guide(name, results):
        return run_program(
            "tests/guides/program.py",
            f"guides/{name}",
            few_images / "images",
            EPOCHS="1",
            MPLBACKEND="agg",
            RESULTS=str(results),
        )

    return run_guide


@pytest.fixture(scope="session")
def pretrained(run_guide, tmp_path_factory):
    """The folder of results of the first guide, and what it printed."""
    folder = tmp_path_factory.mktemp("pretrained")
    return folder, run_guide("pretrain_clip.py", folder)
