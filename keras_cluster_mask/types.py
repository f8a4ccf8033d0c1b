"""Types used in signatures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# A tensor of the backend, a NumPy array, or a symbolic Keras tensor. They share no base
# class that a type checker could use.
Tensor = Any

# Format strings or functions of a class name, or whole sentences by class name.
Templates = str | Callable | Sequence[str | Callable] | Mapping[str, Sequence[str]]
