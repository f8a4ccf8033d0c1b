import numpy as np
import pytest


@pytest.fixture
def noise(encode):
    """Encodes a random image; different seeds give different images."""

    def noise(seed, size=(20, 24), format="PNG"):
        generator = np.random.default_rng(seed)
        return encode(generator.integers(0, 256, (*size, 3), "uint8"), format)

    return noise
