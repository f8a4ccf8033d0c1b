"""Checks the arguments of `image_text_dataset`."""

import collections

from keras_cluster_mask.checks import check_integer, is_positive
from keras_cluster_mask.data.pairs import Pair

# The largest default block size for object stores, and the number of blocks that a
# batch must contain to be well mixed.
BLOCK, RUNS = 64, 16
CROP_SCALE = 0.4, 1.0
# The number of samples that are read to check that they have the requested fields.
EXAMPLES = 8


def check_crop_scale(crop_scale, resize):
    """Checks and returns the range of the area of random crops; None for no crops."""
    if resize == "squash":
        if crop_scale is not None:
            raise ValueError(
                "`crop_scale` must be None where images are squashed, which crops "
                'nothing: pass `resize="crop"` for random crops. '
                f"Received: crop_scale={crop_scale}, resize={resize!r}"
            )
        return None
    crop_scale = CROP_SCALE if crop_scale is None else crop_scale
    is_pair = isinstance(crop_scale, tuple | list) and len(crop_scale) == 2
    if not is_pair or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(
            "`crop_scale` must be two floats, 0 < lowest <= highest <= 1. "
            f"Received: crop_scale={crop_scale}"
        )
    return crop_scale


def check_process(process, batch_size, training):
    """Returns the index of this process and the number of processes."""
    from keras_cluster_mask.distribution.processes import process_index_and_count

    if process is None:
        process = process_index_and_count(training)
    index, count = process
    if not 0 <= index < count:
        raise ValueError(
            "`process` must be a pair (number, count) with 0 <= number < count. "
            f"Received: process={process}"
        )
    if batch_size % count:
        raise ValueError(
            "`batch_size` is global and must be divisible by the number of processes. "
            f"Received: batch_size={batch_size}, {count} processes"
        )
    return index, count


def choose_block_size(block_size, batch_size, processes, remote):
    """Checks `block_size`, or chooses a default."""
    if block_size is None:
        sizes = (BLOCK >> shift for shift in range(BLOCK.bit_length()))
        fitting = (n for n in sizes if not batch_size % n and batch_size >= n * RUNS)
        block_size = next(fitting, 1) if remote else 1
    block_size = check_integer("block_size", block_size, 1)
    runs, rest = divmod(batch_size, block_size)
    if rest or runs % processes:
        fitting = [n for n in range(1, batch_size + 1) if not runs % n and n <= runs]
        raise ValueError(
            "`block_size` must divide `batch_size`, and the number of processes must "
            "divide the number of blocks in a batch"
            + (f": use one of {fitting} processes. " if not rest else ". ")
            + f"Received: block_size={block_size}, batch_size={batch_size}, "
            f"{processes} processes"
        )
    return block_size


def check_weights(source, training, sampling):
    """Raises an error unless a dict from sources to weights is valid and supported."""
    if not source or not all(map(is_positive, source.values())):
        raise ValueError(
            "`source` must be a dict from sources to positive weights. "
            f"Received: source={source!r}"
        )
    if not training or sampling is not None:
        raise ValueError(
            "`source` with weights is for training without `sampling`. Received: "
            f"training={training}, sampling={sampling!r}, source={source!r}"
        )


def _few(index):
    """Reads a few samples of an index, without their image files."""
    numbers = {len(index) * place // EXAMPLES for place in range(EXAMPLES)}
    return index.read(sorted(numbers) if len(index) else [], with_images=False)


def name_of(function):
    """Returns a JSON-compatible identifier of a function or object, or None."""
    named = function if hasattr(function, "__qualname__") else type(function)
    sizes = [
        getattr(function, name, None) for name in ("vocabulary_size", "context_length")
    ]
    return None if function is None else [named.__qualname__, *sizes]


def check_samples(indexes, skipped, reader):
    """Raises an error unless some samples have all requested fields."""
    # An index has no field values, such as labels, so read a few samples.
    examples = [sample for index in indexes for sample in _few(index)]
    if any(isinstance(sample, Pair) for sample in examples):
        return
    faults = collections.Counter(sample.reason for sample in examples)
    faults.update(skipped.by_reason)
    fields = {field for index in indexes for field in index.fields}
    fields = sorted(field for field in fields if not field.endswith("."))
    paths = [path for index in indexes for path in index.paths]
    raise ValueError(
        " ".join(
            [f"`source` must hold samples with {reader.wanted}.", *skipped.details[:1]]
        )
        + f" Received: {dict(faults) or 'no sample'} with the fields {fields} from "
        f"{paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "")
    )
