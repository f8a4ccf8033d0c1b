"""Shared by the tests of the examples: their folder, and a small shard."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))


@pytest.fixture
def shard(copy_pairs, tmp_path):
    """The first 64 held-out images."""
    return copy_pairs("test-00000", tmp_path / "images.tar", 64)
