"""Shared by the tests of the guides: guides run as a program, with little training."""

import pytest

from tests.helpers import run_program


@pytest.fixture
def run_guides(few_images, tmp_path):
    """Runs guides on few images, in one process; returns what each prints.

    Their results are in `tmp_path`.
    """

    def run_guides(*names):
        printed = run_program(
            *("tests/guides/program.py", few_images / "images", *names),
            EPOCHS="1",
            MPLBACKEND="agg",
            RESULTS=str(tmp_path),
        )
        return printed.split("# The next guide\n")[1:]

    return run_guides
