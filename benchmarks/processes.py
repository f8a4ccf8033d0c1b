"""The time of a step in two processes of torch, against one of half the global batch.

    KERAS_BACKEND=torch python benchmarks/processes.py
    KERAS_BACKEND=torch python benchmarks/processes.py --size tiny --image-size 32

Each process has a core and a thread of its own and `--batch-size` pairs of each batch.
Runs of each kind alternate, since processes cannot be timed in turn within one program.
Two processes that train apart show how much slower two busy cores are than one, without
any exchange. Two that train together also time an all-reduce of the size of the
gradients, without a model.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

from reporting import parser, publish

# Processes that run at a time, and how many of them train together.
KINDS = {"one": (1, 1), "two, apart": (2, 1), "two, together": (2, 2)}


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--size", default="vit_b_16", help="of `kcm.models.clip_backbone`")
    add("--image-size", type=int, default=224, help="side in pixels")
    add("--batch-size", type=int, default=8, help="pairs of each process")
    add("--rounds", type=int, default=3, help="runs of each number of processes")
    add("--steps", type=int, default=4, help="timed steps of a run, after a first")
    add("--results", default="results", help="folder for the JSON file")
    add("--process", type=int, help=argparse.SUPPRESS)
    options = parsed.parse_args()
    if options.process is not None:
        print(json.dumps(measure(options)))
        return
    runs = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind in KINDS:
            runs[kind].append(run(*KINDS[kind]))
            print(f"round {number}, {kind}: {runs[kind][-1]}", flush=True)
    seconds = {
        kind: [x for run in found for each in run for x in each["seconds"]]
        for kind, found in runs.items()
    }
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    rows = []
    for kind, (count, _) in KINDS.items():
        row = {
            "processes": kind,
            "seconds a step": f"{medians[kind]:.3f}",
            "from, to": f"{min(seconds[kind]):.3f}, {max(seconds[kind]):.3f}",
            "seconds a pair": f"{medians[kind] / count / options.batch_size:.4f}",
            "/ one": f"{medians[kind] / medians['one']:.3f}",
            "/ two, apart": f"{medians[kind] / medians['two, apart']:.3f}",
        }
        reducing = [x for run in runs[kind] for each in run for x in each["reducing"]]
        if reducing:
            row["of gradients alone (s)"] = f"{statistics.median(reducing):.3f}"
        rows.append(row)
    gradients = runs["one"][0][0]["gradients"] / 2**20
    publish(
        f"{options.results}/processes-{options.size}.json",
        f"torch, {options.size} at {options.image_size} px, cluster masking, "
        f"{options.batch_size} pairs a process, {gradients:.0f} MiB of gradients",
        rows,
        options={**vars(options), "results": "results", "process": None},
        runs=runs,
    )


def run(count, together):
    """Trains in some processes; returns what each of them measured."""
    ports = [free_port() for _ in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--process", str(index)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(index % together),
                "LOCAL_RANK": str(index % together),
                "WORLD_SIZE": str(together),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(ports[index // together]),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError("A process failed; its error is above.")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(options):
    """Seconds of each step and of bare reductions, and the bytes of gradients."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[options.process % len(cores)]})
    import keras
    import numpy as np
    import torch
    from clip_steps import batch
    from timing import Clock

    import keras_cluster_mask as kcm
    from keras_cluster_mask.models.sizes import SIZES

    torch.set_num_threads(1)
    kcm.distribution.initialize()

    backbone = kcm.models.clip_backbone(options.size, options.image_size)
    masking = kcm.ClusterMasking(SIZES[options.size]["patch"], 0.5)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking)
    model.compile(
        keras.optimizers.AdamW(1e-5, weight_decay=0.2, global_clipnorm=1.0),
        log_gradient_norm=True,
    )
    pairs = batch(options.batch_size, options.image_size)
    pairs = {k: np.concatenate([x] * (options.steps + 1)) for k, x in pairs.items()}
    clock = Clock()
    fit = {"batch_size": options.batch_size, "shuffle": False, "verbose": 0}
    model.fit(pairs, callbacks=[clock], **fit)
    count = sum(int(np.prod(v.shape)) for v in model.trainable_weights)
    found = {
        "seconds": clock.seconds(),
        "reducing": reduction_seconds(count),
        "gradients": 4 * count,
    }
    # On a core of its own, a process may end before torch's threads do, and crash.
    torch.distributed.destroy_process_group()
    return found


def reduction_seconds(count, repeats=3):
    """The time to add up float32 numbers of two processes, in buckets."""
    from torch import distributed, zeros

    from keras_cluster_mask.distribution.gradient_buckets import BUCKET_BYTES

    if distributed.get_world_size() == 1:
        return []
    buckets, seconds = zeros(count).split(BUCKET_BYTES // 4), []
    for _ in range(repeats):
        distributed.barrier()
        start = time.perf_counter()
        for work in [distributed.all_reduce(x, async_op=True) for x in buckets]:
            work.wait()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
