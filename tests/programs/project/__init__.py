"""A project that imports the library when Python looks for the module to run."""

import keras_cluster_mask  # noqa: F401
