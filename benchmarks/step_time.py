"""What a training step of CLIP ViT-B/16 costs with each way to mask.

    KERAS_BACKEND=jax python benchmarks/step_time.py
    KERAS_BACKEND=torch python benchmarks/step_time.py --batch-size 256 \\
        --dtype mixed_bfloat16 --jit                         # on a GPU

All methods are timed in turn in one process. Peak memory is that of another process for
each method, which takes one step (`--memory`).
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from clip_vit_b_16 import (
    MASKINGS,
    OPEN_CLIP,
    arithmetic,
    image_tokens,
    training_steps,
)
from reporting import parser, publish
from timing import interleaved, ratio


def arguments():
    parsed = parser(__doc__)
    add = parsed.add_argument
    names = [*MASKINGS, *OPEN_CLIP]
    add("--methods", nargs="+", metavar="METHOD", choices=names, help=f"of {names}")
    add("--batch-size", type=int, default=8)
    add("--rounds", type=int, default=5, help="how often each method is timed")
    add("--repeats", type=int, default=1, help="steps that are timed together")
    add("--dtype", default="float32", help="Keras dtype policy")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--jit", action="store_true", help="compile on torch too")
    add("--memory", action="store_true", help="measure peak memory too")
    add("--results", default="results", help="folder for the JSON file")
    add("--name", help="step_time-NAME.json, instead of the backend's name")
    add("--peak-memory-of", metavar="METHOD", help=argparse.SUPPRESS)
    options = parsed.parse_args()
    if options.methods is None:
        on_torch = keras.backend.backend() == "torch"
        options.methods = [*MASKINGS, *(OPEN_CLIP if on_torch else ())]
    return options


def main():
    options = arguments()
    setting = dict(
        batch_size=options.batch_size,
        dtype=options.dtype,
        jit_compile=True if options.jit else "auto",
        optimizer=options.optimizer,
    )
    if options.peak_memory_of:
        name = options.peak_memory_of
        training_steps([name], **setting)[name]()
        print(peak_memory())
        return

    memory = {}
    if options.memory:
        # First, while this process is small: both have to fit.
        memory = {name: memory_of(name, options) for name in options.methods}
    steps = training_steps(options.methods, **setting)
    seconds = interleaved(steps, options.rounds, options.repeats)
    rows = []
    for name in options.methods:
        row = {
            "method": name,
            "image tokens": image_tokens(name),
            "arithmetic / none": f"{arithmetic(name) / arithmetic('none'):.3f}",
            "step (ms)": round(1000 * statistics.median(seconds[name])),
        }
        for other in ("none", "random", "open_clip, patch dropout 0.5"):
            if other in seconds:
                row[f"/ {other}"] = f"{ratio(seconds, name, other):.3f}"
        if memory:
            row["peak memory (GiB)"] = memory[name]
        rows.append(row)

    backend = keras.backend.backend()
    publish(
        f"{options.results}/step_time-{options.name or backend}.json",
        f"{backend}, batch {options.batch_size}, {options.dtype}, {options.optimizer}",
        rows,
        options=vars(options),
        seconds=seconds,
    )


def memory_of(name, options):
    command = [sys.executable, __file__, "--peak-memory-of", name]
    command += ["--batch-size", str(options.batch_size), "--dtype", options.dtype]
    command += ["--optimizer", options.optimizer]
    command += ["--jit"] if options.jit else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return output.split()[-1]


def peak_memory():
    """Peak memory of this process in GiB: the accelerator's, or else the machine's."""
    # Not `getrusage`, whose peak a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1))
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
    return f"{peak / 2**30:.2f}"


if __name__ == "__main__":
    main()
