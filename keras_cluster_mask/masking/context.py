"""Context that a model passes to the maskings in it during a call.

It replaces call arguments: the layers between the two forward only arguments that they
know.
"""

import contextlib
import threading

# Thread-local, because TensorFlow traces the step of each replica in its own thread.
context = threading.local()


def part_of_batch(size, take):
    """Returns a context in which masking layers see only some rows of a larger batch.

    They draw the noise of the whole batch and take their own rows of it, so a mask does
    not depend on the number of devices or micro-batches.

    Args:
        size: Integer, the number of images in the whole batch.
        take: Function from a `(size, ...)` tensor to the rows that are seen.
    """
    return _within("part", (size, take))


def views_of_image(count):
    """Returns a context in which masking layers make `count` views of each image.

    Each view has its own mask.

    Args:
        count: Integer.
    """
    return _within("views", count)


def prefix_tokens(count):
    """Returns a context that sets `num_prefix_tokens` of layers without their own.

    One masking layer then works in encoders with different prefixes.

    Args:
        count: Integer, or `None` if it is not known.
    """
    return _within("num_prefix_tokens", count)


def kept_patches():
    """Returns a context that yields a list of the `(batch, K)` indices of kept patches.

    Used to select other data of the patches, such as rotary positions.
    """
    return _within("kept", [])


def report_kept(indices):
    """Adds the indices of kept patches to the list of `kept_patches`, if any."""
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
