"""Reads the configs of other libraries into the fields of an `Architecture`."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from keras_cluster_mask.checks import is_integer, is_number, is_positive

# The epsilon of all layer normalizations of CLIP. keras_hub uses 1e-6 in the last one
# of the text tower.
CLIP_EPSILON = 1e-5


class ConfigEntry(NamedTuple):
    """An entry of a config.

    Attributes:
        field: String, the field of `Architecture` that the entry sets, if any.
        default: The value of a config without the entry.
        rule: Key of `RULES`; or a tuple of the supported values, or a dictionary from
            them to the values of the field.
    """

    field: str | None
    default: Any
    rule: str | tuple | dict


def fixed(*values: Any) -> ConfigEntry:
    """Returns an entry for which keras_hub supports only these values."""
    return ConfigEntry(None, values[0], values)


def choice(field: str, values: dict) -> ConfigEntry:
    """Returns an entry that maps its values to values of a field, the default first."""
    return ConfigEntry(field, next(iter(values)), values)


def side_of(size: Any) -> int | None:
    """Returns one integer for `n` or `[n, n]`; `None` for anything else."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if is_integer(size) and size > 0 else None


def _channels(values):
    is_list = isinstance(values, (list, tuple)) and len(values) == 3
    is_right = is_list and all(is_number(x) and math.isfinite(x) for x in values)
    return tuple(map(float, values)) if is_right else None


# Functions from the value of an entry to the value of a field, or to `None` if the
# value is not what the key says.
RULES = {
    "count": lambda x: x if is_integer(x) and x > 0 else None,
    "square": side_of,
    "ratio": lambda x: x if is_positive(x) else None,
    "mean of 3 channels": _channels,
    "deviation of 3 channels": (
        lambda x: y if (y := _channels(x)) and min(y) > 0 else None
    ),
}


def flatten(config: Mapping, parts: tuple[str, ...]) -> dict:
    """Returns all entries of a config. Entries of its parts are named `part.name`."""
    entries = {key: value for key, value in config.items() if key not in parts}
    for part in parts:
        part_entries = (config.get(part) or {}).items()
        entries.update({f"{part}.{key}": x for key, x in part_entries})
    return entries


def read_entries(
    given: Mapping[str, Any], entries: Mapping[str, ConfigEntry]
) -> tuple[dict[str, Any], list[str]]:
    """Reads the entries of a config, and checks each of them.

    Args:
        given: Dictionary, the flattened config.
        entries: Dictionary of the entries that are supported.

    Returns:
        A tuple: a dictionary of values by their fields in `Architecture`; and a list of
        the reasons why the config is not supported, one text per entry.
    """
    values, reasons = {}, []
    for key, (_, default, rule) in entries.items():
        value = values[key] = given.get(key, default)
        if isinstance(rule, str):
            values[key] = RULES[rule](value)
            is_right = values[key] is not None
        else:
            # Unhashable values can be searched for in a list only.
            is_right = value in [*rule]
            if is_right and isinstance(rule, dict):
                values[key] = rule[value]
        if not is_right:
            kind = f"a {rule}" if isinstance(rule, str) else f"one of {[*rule]}"
            reasons.append(f"{key}={value!r} is not {kind}")
    return {x.field: values[key] for key, x in entries.items() if x.field}, reasons


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a file with an object of JSON."""
    content = pathlib.Path(path).expanduser().read_bytes()
    try:
        return {**json.loads(content)}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"A config file must contain a JSON object. Received: {path}: {error}"
        ) from error
