"""Argument checks that all subpackages share."""

import math
import numbers
from typing import Any


def is_integer(value: Any) -> bool:
    """Returns whether a value is a Python or NumPy integer. Booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether a value is a Python or NumPy real number. Booleans are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Returns whether a value is a positive, finite number."""
    return is_number(value) and 0 < value < math.inf


def check_integer(
    name: str, value: Any, at_least: int = 1, or_none: bool = False
) -> int | None:
    """Returns a value as an int, or raises an error if it is invalid or too small."""
    if value is None and or_none:
        return None
    if not is_integer(value) or value < at_least:
        raise ValueError(
            f"`{name}` must be an integer of at least {at_least}"
            f"{', or None' if or_none else ''}. Received: {name}={value!r}"
        )
    return int(value)


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises an error unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {name}={value!r}"
        )


def check_range(name: str, value: Any, low: float, high: float, ends="[]") -> None:
    """Raises an error for a value outside of a range. "[)", "(]", "()" exclude ends."""
    excluded = {"[)": [high], "(]": [low], "()": [low, high]}
    is_inside = is_number(value) and low <= value <= high
    if not is_inside or value in excluded.get(ends, ()):
        interval = f"{ends[0]}{low}, {high:g}{ends[1]}"
        raise ValueError(f"`{name}` must be in {interval}. Received: {name}={value!r}")


def sides_of(name: str, size: Any, other: str = "a positive integer") -> tuple:
    """Returns two positive integers, or raises an error.

    Args:
        name: The name of the argument.
        size: Its value: two integers, or one for both.
        other: For the error message, what it may be other than a tuple.
    """
    sides = [size, size] if is_integer(size) else size
    is_pair = isinstance(sides, tuple | list) and len(sides) == 2
    if not is_pair or not all(is_integer(side) and side > 0 for side in sides):
        raise ValueError(
            f"`{name}` must be {other} or a tuple of two positive integers. "
            f"Received: {name}={size!r}"
        )
    return int(sides[0]), int(sides[1])


def fits_shape(shape: tuple, expected: tuple) -> bool:
    """Returns whether two shapes are equal, except for unknown sizes (`None`)."""
    return len(shape) == len(expected) and all(
        None in sizes or sizes[0] == sizes[1] for sizes in zip(shape, expected)
    )
