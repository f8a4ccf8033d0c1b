"""Peak memory of a training step of a CLIP, by default ViT-B/16, by masking.

    KERAS_BACKEND=jax python benchmarks/step_memory.py --batch-size 32

Each method takes some steps in a process of its own: the optimizer may make its state
only at the end of the first. On an accelerator it is the device's memory, else that of
the process, compilation included. The libraries that a process imports are measured
apart.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from clip_steps import (
    OPEN_CLIP,
    Setting,
    add_step_arguments,
    step_methods,
    training_steps,
)
from reporting import machine, parser, publish

STEPS = 3


def main():
    parsed = parser(__doc__)
    add_step_arguments(parsed)
    add = parsed.add_argument
    add("--batch-size", type=int, default=8)
    add("--results", default="results", help="folder for the JSON file")
    add("--of", metavar="METHOD", help=argparse.SUPPRESS)
    options = parsed.parse_args()
    setting = Setting.of(options)
    if options.of:
        libraries = memory_of_libraries(options.of)
        step = training_steps([options.of], setting)[options.of]
        for _ in range(STEPS):
            step()
        print(peak_memory(), f"{libraries:.3f}")
        return

    rows = []
    for name in step_methods(options):
        command = [sys.executable, *sys.argv, "--of", name]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, libraries = map(float, found.stdout.split()[-2:])
        print(f"{name}: {peak:.3f} GiB", flush=True)
        rows.append(
            {
                "method": name,
                "image tokens": setting.image_tokens(name),
                "peak memory (GiB)": f"{peak:.3f}",
                "of it libraries": f"{libraries:.3f}",
                "without": f"{peak - libraries:.3f}",
            }
        )
    publish(
        f"{options.results}/step_memory-{keras.backend.backend()}.json",
        str(setting),
        rows,
        options={**vars(options), "results": "results"},
    )


def memory_of_libraries(name):
    """GiB of the process once a method's libraries are there; 0 on an accelerator."""
    import keras_hub  # noqa: F401

    if name in OPEN_CLIP:
        import open_clip  # noqa: F401
    return 0.0 if machine()["accelerator"] else process_memory("VmRSS") / 2**30


def process_memory(field):
    """Bytes of this process by a field of Linux: `"VmRSS"` now, `"VmHWM"` the peak."""
    # Not `getrusage`, whose peak a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", status).group(1))


def peak_memory():
    """Peak memory so far in GiB: the accelerator's, or else this process's."""
    peak = process_memory("VmHWM")
    if keras.backend.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
    elif keras.backend.backend() == "jax":
        import jax

        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", peak)
    else:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return f"{peak / 2**30:.3f}"


def memory_of(step):
    """GiB that a step takes beyond what it finds; `None` where peaks are not reset."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


if __name__ == "__main__":
    main()
