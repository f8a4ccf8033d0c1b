"""Shared by the tests of the benchmarks: their folder, and how they are started."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def run(monkeypatch):
    """Runs a benchmark with arguments, as from the command line."""

    def run(benchmark, *arguments):
        # `step_memory` starts itself again with these arguments.
        arguments = [benchmark.__file__, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", arguments)
        benchmark.main()

    return run
