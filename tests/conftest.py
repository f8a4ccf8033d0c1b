"""Imported by pytest before any test."""

import contextlib

with contextlib.suppress(ImportError):
    import torch  # noqa: F401  torch crashes under pytest if tensorflow came first
