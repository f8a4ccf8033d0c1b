"""Imports keras_hub and TensorFlow quietly and in a safe order."""

import contextlib
import os
import re
import sys
import tempfile

# Lines that absl logs for information, and the line before the first of them.
INFORMATION = re.compile(rb"I\d{4} [\d:.]+ |WARNING: All log messages before absl::")


@contextlib.contextmanager
def without_start_messages():
    """A context that keeps what TensorFlow logs for information off the screen.

    All else that is written to stderr appears at the end of the context. With
    `TF_CPP_MIN_LOG_LEVEL=0`, nothing is kept off.
    """
    screen = None
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "0":
        # A program may have closed stderr.
        with contextlib.suppress(OSError):
            screen = os.dup(2)
    if screen is None:
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)
            file.seek(0)
            rest = [line for line in file if not INFORMATION.match(line)]
            os.write(2, b"".join(rest))


def import_triton_first():
    """Imports triton, if it is installed, before TensorFlow is imported.

    TensorFlow 2.20 and 2.21 end a program that imports triton after them, as
    torchvision does (github.com/tensorflow/tensorflow/issues/124205).
    """
    if "tensorflow" not in sys.modules:
        # A broken triton is a matter for those who use it.
        with contextlib.suppress(Exception):
            import triton  # noqa: F401


def import_keras_hub():
    """The package keras_hub, which imports TensorFlow on every backend."""
    if "keras_hub" in sys.modules:
        return sys.modules["keras_hub"]
    import_triton_first()
    with without_start_messages():
        import keras_hub
    return keras_hub
