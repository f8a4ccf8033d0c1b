"""Shared by the tests of the examples: their folder, and a small shard."""

import pathlib
import sys

import pytest

from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.pairs import PairReader

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture
def shard(write_tar):
    """The first 64 held-out images."""
    files = []
    source = ROOT / "datasets" / "images" / "test-00000.tar"
    for pair in open_index(source, PairReader()).read(range(64)):
        files.append((f"{pair.key}.webp", pair.image))
        files.append((f"{pair.key}.txt", pair.captions[0].encode()))
    return write_tar("images.tar", files)
