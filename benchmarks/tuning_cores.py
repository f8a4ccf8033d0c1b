"""How fast two cores tune two pre-trained encoders: as two threads, or two processes.

    python benchmarks/tuning_cores.py --data DIR

`--encoders` is the folder of `connect_encoders.py`. Each setting trains on the same
batches, in turn, in processes of its own, and reads and decodes its data meanwhile.
"""

import json
import os
import subprocess
import sys
import time

import connect_encoders as runs  # Chooses torch.
import keras
from reporting import publish
from timing import ratio

import keras_cluster_mask as kcm

# Processes, and threads of each.
SETTINGS = {"one thread": (1, 1), "two threads": (1, 2), "two processes": (2, 1)}


def main():
    parsed = runs.common_arguments(__doc__)
    parsed.add_argument("--rounds", type=int, default=3)
    parsed.add_argument("--steps", type=int, default=10)
    parsed.set_defaults(runs=[runs.Tuning("random")])
    options = parsed.parse_args()
    if len(options.runs) != 1:
        parsed.error("--runs must be one run")
    if "WORLD_SIZE" in os.environ:
        return train(options)
    seconds = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name, setting in SETTINGS.items():
            seconds[name].append(seconds_of(*setting))
    first, rows = next(iter(SETTINGS)), []
    for name, found in seconds.items():
        to_first = ratio(seconds, name, first)
        rows.append({"cores": name, "seconds": min(found), f"/ {first}": to_first})
    path = f"{options.results}/tuning_cores.json"
    title = f"A step that tunes two encoders, {runs.words_of(*options.runs)}"
    publish(path, title, rows, commit=runs.commit(), seconds=seconds)


def seconds_of(processes, threads):
    """The seconds of a step of this program, in so many processes."""
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    program = [*sys.argv, f"--threads={threads}"]
    out = subprocess.check_output([sys.executable, *launch, *program], text=True)
    return json.loads(out.splitlines()[-1])


def train(options):
    """Trains on its share of the batches, and prints seconds per step."""
    kcm.distribution.initialize()
    runs.prepare(options)
    (run,) = options.runs
    model = runs.model_to_tune(options, 0, run)
    runs.compile_for(model, run, 2 * options.steps)
    began = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: began.append(time.perf_counter())
    )
    model.fit(
        runs.dataset(options, "train", model, run),
        steps_per_epoch=options.steps,
        epochs=2,  # The first one warms up.
        verbose=0,
        callbacks=[note],
    )
    if kcm.distribution.is_main_process():
        print((time.perf_counter() - began[-1]) / options.steps)


if __name__ == "__main__":
    main()
