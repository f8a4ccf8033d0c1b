"""What a model tells the maskings in it, around a call.

Layers lie between the two, and pass on no arguments that they do not know.
"""

import contextlib
import threading

# Per thread, as TensorFlow traces the step of each replica in a thread of its own.
context = threading.local()


def part_of_batch(size, take):
    """A context in which masking layers see only some rows of a larger batch.

    They draw the noise of the whole batch and take their own rows of it, so that a mask
    depends neither on the number of devices nor on that of micro-batches.

    Args:
        size: Integer, the number of images in the whole batch.
        take: Function from a `(size, ...)` tensor to the rows that are seen.
    """
    return _within("part", (size, take))


def views_of_image(count):
    """A context in which masking layers make `count` views of each image.

    Each view has a mask of its own.

    Args:
        count: Integer.
    """
    return _within("views", count)


def prefix_tokens(count):
    """A context that sets `num_prefix_tokens` of masking layers without their own.

    One masking then serves encoders with different prefixes.

    Args:
        count: Integer, or `None` if it is not known.
    """
    return _within("num_prefix_tokens", count)


def kept_patches():
    """A context that yields a list of the indices `(batch, K)` of kept patches.

    For what belongs to a patch besides its token.
    """
    return _within("kept", [])


def report_kept(indices):
    """Adds what a masking keeps to the list of `kept_patches` around it, if any."""
    kept = getattr(context, "kept", None)
    if kept is not None:
        kept.append(indices)


@contextlib.contextmanager
def _within(name, value):
    before = getattr(context, name, None)
    setattr(context, name, value)
    try:
        yield value
    finally:
        setattr(context, name, before)
