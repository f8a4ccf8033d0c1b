"""The time of a training step of a CLIP, by default ViT-B/16, with each masking.

    KERAS_BACKEND=jax python benchmarks/step_time.py
    KERAS_BACKEND=torch python benchmarks/step_time.py --batch-size 256 1024 \\
        --dtype mixed_bfloat16 --jit                         # on a GPU

All methods of a batch size are timed in turn in one process. Each step, open_clip's
too, copies its batch to the device and waits for the loss. A method that runs out of
memory is reported as such, and the others are timed. On torch and a GPU, the table has
the memory that a step takes beyond weights and optimizer, which all methods hold at the
same time; `step_memory.py` measures each method alone, on every backend.
"""

import os
import statistics
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from clip_steps import Setting, add_step_arguments, step_methods, training_steps
from flops import peak_tflops, utilization
from reporting import card, machine, parser, publish
from step_memory import memory_of
from timing import fits, interleaved, ratio, release_memory

OUT_OF_MEMORY = "out of memory"


def main():
    parsed = parser(__doc__)
    add_step_arguments(parsed)
    add = parsed.add_argument
    add("--batch-size", type=int, nargs="+", default=[8])
    add("--rounds", type=int, default=5, help="how often each method is timed")
    add("--repeats", type=int, default=1, help="steps that are timed together")
    add("--peak-tflops", type=float, help="of the card in the step's dtype")
    add("--results", default="results", help="folder for the JSON file")
    add("--name", help="of the file, step_time-NAME.json, instead of the backend's")
    options = parsed.parse_args()

    methods = step_methods(options)
    peak = options.peak_tflops
    if peak is None and "bfloat16" in options.dtype:
        peak = peak_tflops(machine()["accelerator"])
    rows, seconds = [], {}
    for size in options.batch_size:
        setting = Setting.of(options, batch_size=size)
        steps = steps_that_fit(methods, setting)
        memory = {name: memory_of(step) for name, step in steps.items()}
        seconds[size] = interleaved(steps, options.rounds, options.repeats)
        del steps
        for name in methods:
            rows.append(table_row(name, setting, seconds[size], memory, peak))
            print(rows[-1], flush=True)
    sizes = ", ".join(map(str, options.batch_size))
    name = options.name or "-".join(filter(None, (keras.backend.backend(), card())))
    # The name of the folder, and not where it is here.
    captions = options.captions and Path(options.captions).parent.name
    publish(
        f"{options.results}/step_time-{name}.json",
        str(Setting.of(options, batch_size=sizes)),
        rows,
        options={**vars(options), "results": "results", "captions": captions},
        seconds=seconds,
    )


def table_row(name, setting, seconds, memory, peak):
    """One row of the report, for a method and a batch size, with the known columns."""
    row = {
        "batch": setting.batch_size,
        "method": name,
        "image tokens": setting.image_tokens(name),
        "text tokens": setting.text_tokens(name),
        "arithmetic / none": (
            f"{setting.arithmetic(name) / setting.arithmetic('none'):.3f}"
        ),
    }
    if name not in seconds:
        return row | {"step (ms)": OUT_OF_MEMORY}
    step = statistics.median(seconds[name])
    row["step (ms)"] = round(1000 * step)
    row["images/s"] = f"{setting.batch_size / step:.4g}"
    for other in ("none", "random", "open_clip, patch dropout 0.5", "none, 77 tokens"):
        if other in seconds:
            row[f"/ {other}"] = f"{ratio(seconds, name, other):.3f}"
    if memory[name] is not None:
        row["memory of a step (GiB)"] = f"{memory[name]:.2f}"
    if peak is not None:
        flops = setting.batch_size * setting.arithmetic(name)
        row["utilization"] = f"{utilization(flops, step, peak):.1%}"
    return row


def steps_that_fit(methods, setting):
    """Functions of the methods that do not run out of memory, after one step each."""
    # Those of most tokens first: one that fails may spoil the weights that it shares
    # with others, so all are made again, and those not tried yet lose nothing.
    left = sorted(methods, key=setting.image_tokens, reverse=True)
    while True:
        steps = training_steps(left, setting)
        failed = next((name for name in left if not fits(steps[name])), None)
        if failed is None:
            return {name: steps[name] for name in methods if name in steps}
        print(f"{failed}, batch {setting.batch_size}: {OUT_OF_MEMORY}", flush=True)
        left.remove(failed)
        del steps
        release_memory()


if __name__ == "__main__":
    main()
