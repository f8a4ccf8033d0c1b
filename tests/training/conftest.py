"""Read by pytest before the tests of this folder."""

import pytest


@pytest.fixture(autouse=True)
def seeded():
    """The same weights in each run, for tests that something is learned."""
    import keras

    keras.utils.set_random_seed(0)
