import re

import numpy as np
import pytest

from keras_cluster_mask.checks import (
    check_choice,
    check_integer,
    check_range,
    is_positive,
    sides_of,
)

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_python_and_numpy_become_ints(value):
    assert type(check_integer("n", value, 3)) is int
    assert check_integer("n", value) == 3


def test_none_may_be_allowed():
    assert check_integer("n", None, or_none=True) is None
    with pytest.raises(ValueError, match=r"of at least 2, or None\. Received: n=1"):
        check_integer("n", 1, 2, or_none=True)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (check_integer, [3], [True, 0, -1, 2.0, np.float32(2), "2", None]),
        (
            lambda *x: check_range(*x, 0, 1, "[)"),
            [0, 0.5, np.float32(0.5)],
            [-0.1, 1, True, "0.5", None],
        ),
        (lambda *x: check_range(*x, 0, 1, "(]"), [0.1, 1.0], [0, 1.1, None]),
        (lambda *x: check_range(*x, 0, 1, "()"), [0.1], [0, 1.0]),
        (
            lambda *x: check_range(*x, -1, 1),
            [-1, 0.0, 1, np.float64(0.5)],
            [-1.1, 2, True, None, float("nan")],
        ),
        (lambda *x: check_choice(*x, ("a", None)), ["a", None], ["b", 1]),
        (
            sides_of,
            [8, (8, 4), [np.int64(8), 4]],
            [0, (8, 8, 8), (8,), (8, -8), (8.0, 4), 8.0, "8", None],
        ),
    ],
)
def test_a_value_outside_is_named(check, right, wrong):
    for value in right:
        check("x", value)
    for value in wrong:
        message = re.escape(f"Received: x={value!r}")
        with pytest.raises(ValueError, match=rf"`x` must be .*{message}"):
            check("x", value)


def test_positive_numbers_are_finite():
    assert all(map(is_positive, [1, 0.1, np.float32(2)]))
    assert not any(map(is_positive, [0, -1, float("inf"), float("nan"), True, "1"]))
