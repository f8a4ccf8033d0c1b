"""Reads the configs of other libraries into the fields of an `Architecture`."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from keras_cluster_mask.checks import is_integer, is_number, is_positive


class Entry(NamedTuple):
    """An entry of a config.

    Attributes:
        field: String, the field of `Architecture` that the entry sets, if any.
        default: The value of a config without the entry.
        rule: Key of `RULES`, or a tuple of the supported values.
    """

    field: str | None
    default: Any
    rule: str | tuple


def fixed(*values: Any) -> Entry:
    """Returns an entry of which keras_hub's models support these values only."""
    return Entry(None, values[0], values)


def side_of(size: Any) -> int | None:
    """Returns one integer for `n` or `[n, n]`; `None` for anything else."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if is_integer(size) and size > 0 else None


def _is_of_channels(values):
    is_list = isinstance(values, (list, tuple)) and len(values) == 3
    return is_list and all(is_number(x) and math.isfinite(x) for x in values)


# The kinds of values, by what an error says about others.
INTEGER, SIDE, RATIO = "a positive integer", "the size of a square", "a positive number"
MEAN, STD = "three finite numbers", "three finite numbers above 0"
RULES = {
    INTEGER: lambda x: is_integer(x) and x > 0,
    SIDE: side_of,
    RATIO: is_positive,
    MEAN: _is_of_channels,
    STD: lambda x: _is_of_channels(x) and min(x) > 0,
}


def flatten(config: Mapping, parts: tuple[str, ...]) -> dict:
    """Returns all entries of a config: those of its parts are named `part.name`."""
    entries = {key: value for key, value in config.items() if key not in parts}
    for part in parts:
        entries.update({f"{part}.{key}": x for key, x in config[part].items()})
    return entries


def read_entries(
    given: Mapping[str, Any],
    entries: Mapping[str, Entry],
    divisors: Mapping[str, str],
) -> tuple[dict[str, Any], list[str]]:
    """Reads the entries of a config, and checks each of them.

    Args:
        given: Dictionary, the flattened config.
        entries: Dictionary of the entries that are supported.
        divisors: Dictionary from the name of an entry to that of another one, which
            must divide it.

    Returns:
        A tuple: a dictionary of values by their fields in `Architecture`; and a list of
        the reasons why the config is not supported, one text per entry.
    """
    values = {key: given.get(key, entry.default) for key, entry in entries.items()}
    reasons = []
    for key, (_, _, rule) in entries.items():
        is_choice = isinstance(rule, tuple)
        if not (values[key] in rule if is_choice else RULES[rule](values[key])):
            rule = f"one of {[*rule]}" if is_choice else rule
            reasons.append(f"{key}={values[key]!r} is not {rule}")
    if not reasons:
        reasons = [
            f"{divisor}={values[divisor]} does not divide {key}={values[key]}"
            for key, divisor in divisors.items()
            if values[key] % values[divisor]
        ]
    fields = {x.field: values[key] for key, x in entries.items() if x.field}
    for name in ("patch", "image_size"):
        if name in fields:
            fields[name] = side_of(fields[name])
    return fields, reasons


def read_json(argument: str, path: str | os.PathLike) -> Any:
    """Reads the JSON file that an argument names."""
    path = pathlib.Path(path).expanduser()
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"`{argument}` must be a file that exists. "
            f"Received: {argument}={str(path)!r}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must be a file of JSON ({error}). "
            f"Received: {argument}={str(path)!r}"
        ) from error
