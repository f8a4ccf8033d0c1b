import threading
from contextlib import contextmanager

# Per thread, as TensorFlow traces the step of each replica in a thread of its own.
_current = threading.local()


@contextmanager
def part_of_batch(size, take):
    """Says that the maskings called within see only some rows of a larger batch.

    They draw the noise of the whole batch and keep their own rows of it, so that a
    mask depends neither on the number of devices nor on that of micro-batches.

    Args:
        size: Integer, the number of images in the whole batch.
        take: Function from a `(size, ...)` tensor to the rows that are seen.
    """
    before = getattr(_current, "part", None)
    _current.part = size, take
    try:
        yield
    finally:
        _current.part = before


def current_part():
    """The `(size, take)` of the innermost `part_of_batch`, or `None`."""
    return getattr(_current, "part", None)
