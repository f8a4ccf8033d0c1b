"""Backend-specific code: batches in chunks, and batches over several devices.

The rest of the library is written once, in `keras.ops`. Only the backend in use is
imported.
"""

from keras_cluster_mask.distribution.processes import initialize
from keras_cluster_mask.distribution.replicas import is_main_process, num_replicas

__all__ = ["initialize", "is_main_process", "num_replicas"]


def __dir__():
    return __all__
