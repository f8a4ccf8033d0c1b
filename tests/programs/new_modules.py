"""Prints which packages the library brings that Keras does not."""

import sys

import keras  # noqa: F401

before = {name.partition(".")[0] for name in sys.modules}
__import__("keras_cluster_mask")
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - {*sys.stdlib_module_names}))
print("keras_cluster_mask.masking" in sys.modules)
