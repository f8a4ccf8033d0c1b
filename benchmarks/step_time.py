"""The time of a training step of a CLIP, by default ViT-B/16, with each masking.

    KERAS_BACKEND=jax python benchmarks/step_time.py
    KERAS_BACKEND=torch python benchmarks/step_time.py --batch-size 256 \\
        --dtype mixed_bfloat16 --jit                         # on a GPU

All methods are timed in turn in one process.
"""

import os
import statistics

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from clip_steps import Setting, add_step_arguments, step_methods, training_steps
from reporting import parser, publish
from timing import interleaved, ratio


def main():
    parsed = parser(__doc__)
    add_step_arguments(parsed)
    add = parsed.add_argument
    add("--rounds", type=int, default=5, help="how often each method is timed")
    add("--repeats", type=int, default=1, help="steps that are timed together")
    add("--results", default="results", help="folder for the JSON file")
    add("--name", help="of the file, step_time-NAME.json, instead of the backend's")
    options = parsed.parse_args()

    setting, methods = Setting.of(options), step_methods(options)
    steps = training_steps(methods, setting)
    seconds = interleaved(steps, options.rounds, options.repeats)
    whole = setting.arithmetic("none")
    rows = []
    for name in methods:
        row = {
            "method": name,
            "image tokens": setting.image_tokens(name),
            "arithmetic / none": f"{setting.arithmetic(name) / whole:.3f}",
            "step (ms)": round(1000 * statistics.median(seconds[name])),
        }
        for other in ("none", "random", "open_clip, patch dropout 0.5"):
            if other in seconds:
                row[f"/ {other}"] = f"{ratio(seconds, name, other):.3f}"
        rows.append(row)
    publish(
        f"{options.results}/step_time-{options.name or keras.backend.backend()}.json",
        str(setting),
        rows,
        options=vars(options),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
