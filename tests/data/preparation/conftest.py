import pathlib

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data.preparation.samples import Fault, Samples

PHOTOGRAPHS = pathlib.Path(__file__).parents[3] / "datasets" / "photographs"


@pytest.fixture(scope="session")
def photographs():
    """dict from a name to a real photograph."""
    return {path.stem: Image.open(path) for path in sorted(PHOTOGRAPHS.glob("*.jpg"))}


@pytest.fixture
def pairs_of():
    """What `PairReader` finds in a source: keys, bytes and captions."""

    def pairs_of(source):
        found = []
        for item, _ in Samples(source).read():
            assert not isinstance(item, Fault), item
            image = item.image
            if isinstance(image, str):
                image = pathlib.Path(image).read_bytes()
            found.append((item.key, image, item.captions))
        return found

    return pairs_of


@pytest.fixture
def noise(encode):
    """Pictures that are all different and not flat."""

    def noise(seed, size=(20, 24), format="PNG"):
        generator = np.random.default_rng(seed)
        return encode(generator.integers(0, 256, (*size, 3), "uint8"), format)

    return noise


@pytest.fixture
def files_below():
    """dict from the name of each file below a folder to its bytes."""

    def files_below(folder):
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(pathlib.Path(folder).rglob("*"))
            if path.is_file()
        }

    return files_below
