"""What the devices of a compiled JAX program send one another."""

import collections
import math
import re

KINDS = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][a-z0-9-]*)\(")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(body|calls|to_apply|\w+_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CHANNEL = re.compile(r"channel_id=(\d+)")
# As `[groups,devices of a group]<=[...]`, or as a list of lists.
GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]|replica_groups=\{\{([\d,]+)\}")
# Or, for TPUs, as some of the axes of a mesh: `mesh['a'=4,'b'=2] {'a'}`.
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


def collectives(text, num_devices):
    """Finds the collectives of a program that was compiled for several devices.

    Example:

    ```
    text = jax.jit(step).lower(state, batch).compile().as_text()
    collectives(text, 4)["all-reduce", "f32[768,512]"]  # 1572864 bytes
    ```

    Args:
        text: String, `as_text()` of a compiled program: HLO of one device.
        num_devices: Integer.

    Returns:
        A `Counter` of bytes a step by `(kind, shape)`. A loop's collectives count as
        often as it runs. The bytes are those of the larger of what a device puts in and
        what it gets out. How many of them pass its links, and how often, depends on the
        algorithm.

    Raises:
        ValueError: If collectives are in a loop whose number of runs is not known.
    """
    computations, entry = _computations(text)
    found, parts = collections.Counter(), set()

    def add(name, times, is_fused=False):
        for kind, types, line in computations[name]:
            called = [each for _, each in CALLED.findall(line)]
            for branches in BRANCHES.findall(line):
                called += [x.strip().lstrip("%") for x in branches.split(",")]
            runs = times
            if kind == "while":
                trips = TRIP_COUNT.search(line)
                runs = times * int(trips.group(1)) if trips else None
            for each in called:
                if each in computations:
                    add(each, runs, is_fused or kind == "fusion")
            if kind.removesuffix("-start") not in KINDS:
                continue
            if is_fused and (channel := CHANNEL.search(line)):
                # On TPUs, each computation that it overlaps with contains it.
                part = kind, channel.group(1), str(SHAPE.findall(types))
                if part in parts:
                    continue
                parts.add(part)
            group = _group_size(line, num_devices)
            if group == 1:
                continue
            if times is None:
                raise ValueError(
                    "Collectives must be outside of loops whose number of runs is not "
                    f"known. Received: {line.strip()[:200]}"
                )
            for shape, size in _results(kind, types):
                if kind.startswith("reduce-scatter"):
                    size *= group
                # A TPU scatters while it reduces.
                scatters = name.startswith("all-reduce-scatter")
                label = "reduce-scatter" if scatters else kind.removesuffix("-start")
                found[label, shape] += times * size

    add(entry, 1)
    return found


def by_kind(found):
    """Bytes of each kind, from those that `collectives` found."""
    total = collections.Counter()
    for (kind, _), size in found.items():
        total[kind] += size
    return dict(total)


def _computations(text):
    """Lists of `(operation, types, line)` by computation, and the first one's name."""
    computations, entry, lines = {}, None, None
    for line in text.splitlines():
        header = COMPUTATION.match(line)
        if header:
            lines = computations[header.group(2)] = []
            entry = header.group(2) if header.group(1) else entry
        elif lines is not None and (instruction := INSTRUCTION.match(line)):
            lines.append((instruction.group(2), instruction.group(1), line))
    return computations, entry


def _group_size(line, num_devices):
    if mesh := MESH.search(line):
        sizes, axes = mesh.groups()
        return math.prod(
            int(size)
            for axis, size in re.findall(r"('\w+')=(\d+)", sizes)
            if axis in axes
        )
    groups = GROUPS.search(line)
    if groups is None:
        # A permutation has pairs, and an empty list of groups is one of all devices.
        return num_devices
    size, first = groups.groups()
    return int(size) if size else len(first.split(","))


def _results(kind, types):
    """Shapes and bytes of the results of a collective of one device."""
    shapes = SHAPE.findall(types)
    if kind == "all-gather-start":
        shapes = shapes[len(shapes) // 2 :]  # After the operands.
    elif kind == "collective-permute-start":
        shapes = shapes[1:2]
    for dtype, sides in shapes:
        count = math.prod(int(side) for side in sides.split(",") if side)
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
        yield f"{dtype}[{sides}]", count * bits // 8
