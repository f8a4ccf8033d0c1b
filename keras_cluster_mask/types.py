"""Types that signatures name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# A tensor of the backend, a NumPy array, or a Keras tensor while a model is made. They
# have no class in common, and type checkers know none of them all.
Tensor = Any

# Formats or functions of a class's name; or whole sentences, by class.
Templates = str | Callable | Sequence[str | Callable] | Mapping[str, Sequence[str]]
