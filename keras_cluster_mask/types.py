"""Types that signatures name."""

from typing import Any

# A tensor of the backend, a NumPy array, or a Keras tensor while a model is made. They
# have no class in common, and type checkers know none of them all.
Tensor = Any
