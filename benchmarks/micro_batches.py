"""Step time and peak memory by batch, micro-batch, checkpointing and devices.

    KERAS_BACKEND=jax python benchmarks/micro_batches.py
    KERAS_BACKEND=torch python benchmarks/micro_batches.py \
        --size vit_b_16 --image-size 224 --batch-size 256 --dtype mixed_bfloat16

Each row trains in a process of its own on batches of `--batch-size` pairs, or of eight
times as many: whole, in micro-batches of `--batch-size`, or with gradient
checkpointing. Two devices are virtual ones that share the processor (JAX and
TensorFlow; torch takes a process per device).
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import subprocess
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Its allocator never frees memory, which hides the peaks.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from reporting import parser, publish

GROWTH = 8


def arguments():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--size", default="tiny", help="of `kcm.models.clip_backbone`")
    add("--image-size", type=int, default=64, help="side in pixels")
    add("--batch-size", type=int, default=64, help="the smaller batch")
    add("--dtype", default="float32", help="Keras dtype policy")
    add("--steps", type=int, default=4, help="timed steps, after one to compile")
    add("--results", default="results", help="folder for the JSON file")
    add("--row", type=json.loads, help=argparse.SUPPRESS)
    return parsed.parse_args()


def configurations(small):
    large = GROWTH * small
    rows = [
        dict(batch=small),
        dict(batch=large),
        dict(batch=large, micro=small),
        dict(batch=large, checkpointing=True),
    ]
    if os.environ["KERAS_BACKEND"] != "torch":
        rows += [dict(batch=large, devices=2)]
        rows += [dict(batch=large, micro=small, devices=2)]
    return rows


def main():
    options = arguments()
    if options.row is not None:
        print(json.dumps(measure(options, **options.row)))
        return
    rows = []
    for row in configurations(options.batch_size):
        command = [sys.executable, *sys.argv, "--row", json.dumps(row)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(found.stdout.splitlines()[-1])
        rows.append(found | dict(row))
        print(row, found, flush=True)
    whole = next(x for x in rows if x["batch"] != options.batch_size)
    table = [
        {
            "batch": row["batch"],
            "micro-batch": row.get("micro", "whole"),
            "gradient checkpointing": row.get("checkpointing", False),
            "devices": row.get("devices", 1),
            "seconds a step": f"{row['seconds']:.2f}",
            "to the whole batch": f"{row['seconds'] / whole['seconds']:.2f}",
            "peak memory (GiB)": f"{row['peak']:.3f}",
            "of it the step's": f"{row['peak'] - row['before']:.3f}",
        }
        for row in rows
    ]
    backend = os.environ["KERAS_BACKEND"]
    publish(
        f"{options.results}/micro_batches-{backend}.json",
        f"{backend}, {options.size} at {options.image_size} px, {options.dtype}",
        table,
        options={k: v for k, v in vars(options).items() if k != "row"},
        measured=rows,
    )


def measure(options, batch, micro=None, checkpointing=False, devices=1):
    """Seconds per step, and memory before the timed steps and at its peak."""
    scope = use_devices(devices)
    import keras
    import numpy as np
    from step_memory import peak_memory
    from timing import Clock

    import keras_cluster_mask as kcm

    with scope:
        backbone = kcm.models.clip_backbone(
            options.size, options.image_size, vocabulary_size=8192, dtype=options.dtype
        )
        masking = kcm.ClusterMasking(backbone.vision_encoder.patch_size)
        model = kcm.ContrastiveModel.from_backbone(
            backbone,
            masking,
            micro_batch_size=micro,
            gradient_checkpointing=checkpointing,
        )
        model.compile(keras.optimizers.AdamW(1e-4))
        model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    shape = (batch, options.image_size, options.image_size, 3)
    pairs = {
        "images": rng.integers(0, 256, shape, dtype="uint8"),
        "token_ids": rng.integers(1, 8192, (batch, 77)).astype("int32"),
    }
    before = []
    clock = Clock(after_first=lambda: before.append(forget_peak()))
    epochs = options.steps + 1
    model.fit(**one_batch(pairs), epochs=epochs, verbose=0, callbacks=[clock])
    return dict(
        seconds=statistics.median(clock.seconds()),
        before=before[0],
        peak=float(peak_memory()),
    )


def forget_peak():
    """Resets the peak of memory; returns the memory in use, in GiB.

    Compilation, which takes most of it for small models, then does not count.
    """
    import keras
    from step_memory import peak_memory

    if keras.backend.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    # Frees memory first: its reuse would not show in the peak.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return float(peak_memory())


def use_devices(count):
    """Sets up virtual devices before anything is computed; returns a scope."""
    import contextlib

    if count == 1:
        return contextlib.nullcontext()
    if os.environ["KERAS_BACKEND"] == "jax":
        flag = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = flag
        import keras

        keras.distribution.set_distribution(keras.distribution.DataParallel())
        return contextlib.nullcontext()
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    virtual = [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
    tf.config.set_logical_device_configuration(cpu, virtual)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)]).scope()


def one_batch(pairs):
    """Arguments of `fit` for epochs of one batch whose size every backend knows."""
    batch = len(pairs["token_ids"])
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        return dict(x=pairs, batch_size=batch, shuffle=False)
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(pairs)
    return dict(x=data.batch(batch, drop_remainder=True))


if __name__ == "__main__":
    main()
