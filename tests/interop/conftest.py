"""Read by pytest before the tests of this folder."""

import os

# Compiling takes nearly all the time of these tests on JAX: models of a few
# thousand weights need no optimised code.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
