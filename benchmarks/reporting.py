"""How every benchmark reports: a table, a JSON file, the machine."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
from pathlib import Path

PACKAGES = ("keras", "keras-hub", "jax", "tensorflow", "torch", "open_clip_torch")


def parser(description):
    """An argument parser that shows the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def publish(path, title, rows, **content):
    """Prints rows under a title and the machine, and writes them with all content."""
    found = machine()
    print(f"\n{title}\n\n{table(rows)}\n\n{describe(found)}\n", flush=True)
    write_json(path, machine=found, title=title, rows=rows, **content)


def machine():
    """The machine and the versions of packages, as a dictionary."""
    found = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "accelerator": _accelerator(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(found):
    """One line from what `machine` found."""
    packages = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found)
    hardware = found["accelerator"] or "no accelerator"
    return (
        f"{found['processor']}, {found['cores']} cores, {hardware}; "
        f"Python {found['python']}, {packages}"
    )


def card():
    """The accelerator's name as a part of a file's name, or `None`."""
    name = _accelerator()
    if name is None:
        return None
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


def table(rows):
    """Dictionaries as rows of a Markdown table; missing entries stay empty."""
    if not rows:
        return "(nothing measured)"
    header = list(dict.fromkeys(name for row in rows for name in row))
    lines = [header, ["---"] * len(header)]
    lines += [[str(row.get(name, "")) for name in header] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_spread(values, decimals=1):
    """The mean of some numbers, and their standard deviation if there are several."""
    values = list(values)
    several = len(values) > 1
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if several else ""
    return f"{statistics.fmean(values):.{decimals}f}{spread}"


def write_json(path, **content):
    """Writes JSON in one move, so that an interrupted run leaves no partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(path.suffix + ".draft")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


def _processor():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerator():
    """The name of the accelerator that the running backend sees, or `None`."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    if keras.backend.backend() == "jax":
        import jax

        device = jax.devices()[0]
        return None if device.platform == "cpu" else device.device_kind
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        return None
    return tf.config.experimental.get_device_details(devices[0]).get("device_name")
