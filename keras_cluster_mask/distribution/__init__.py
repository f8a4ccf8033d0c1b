"""What differs between backends: chunks of a batch, and batches over many devices.

The rest of the library is written once, in `keras.ops`. No backend is imported but the
one that runs.
"""

from keras_cluster_mask.distribution.chunks import (
    in_chunks,
    merge_chunks,
    run_again,
    take_chunk,
)
from keras_cluster_mask.distribution.generators import (
    read_generators,
    write_generators,
)
from keras_cluster_mask.distribution.processes import (
    initialize,
    is_main_process,
    process,
    to_numpy,
    values_of_all,
)
from keras_cluster_mask.distribution.replicas import (
    average,
    gather,
    num_replicas,
    of_all_replicas,
    own_rows,
    replica_index,
    replicas_share,
    share_of_loss,
)
from keras_cluster_mask.distribution.training import (
    check_batch_size,
    inner_optimizer,
    once_there,
    prepare,
)

__all__ = [
    "average",
    "check_batch_size",
    "gather",
    "in_chunks",
    "initialize",
    "inner_optimizer",
    "is_main_process",
    "merge_chunks",
    "num_replicas",
    "of_all_replicas",
    "once_there",
    "own_rows",
    "prepare",
    "process",
    "read_generators",
    "replica_index",
    "replicas_share",
    "run_again",
    "share_of_loss",
    "take_chunk",
    "to_numpy",
    "values_of_all",
    "write_generators",
]
