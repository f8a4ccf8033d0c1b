"""Read by pytest before the tests of this folder."""

import os

import pytest

# Compiling takes nearly all the time of these tests on JAX: models of a few
# thousand weights need no optimised code.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)


@pytest.fixture(autouse=True)
def seeded():
    """The same weights in each run, for tests that something is learned."""
    import keras

    keras.utils.set_random_seed(0)
