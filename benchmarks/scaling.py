"""What a training step needs on up to 256 devices, from JAX's compiler.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --derive     # hours and cost of the paper's training

The step of a CLIP, by default ViT-B/16 with cluster masking, is compiled for virtual
devices and never run. Each row is one compilation in a process of its own. It gives the
memory of one device, its floating-point operations, and what the devices send one
another. `--topology v5e:16x16` compiles for TPUs, which need not be there, if `libtpu`
is installed.
"""

import argparse
import json
import os
import subprocess
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collectives import by_kind, collectives
from reporting import parser, publish

# Devices, pairs of all devices, devices that share a model, and pairs at a time.
ROWS = (
    dict(devices=1, batch=128),
    dict(devices=8, batch=1024),
    dict(devices=64, batch=8192),
    dict(devices=256, batch=32768),
    dict(devices=256, batch=32768, shards=2),
    dict(devices=256, batch=32768, shards=4),
    dict(devices=64, batch=32768, micro=8192),
)
# Name, number of devices, TFLOP/s of one in dense bfloat16, assumed price of an hour.
HARDWARE = (("H100", 8, 989, 3.0), ("TPU v5e", 64, 197, 1.2), ("TPU v6e", 64, 918, 2.7))
MEBIBYTE = 2**20
# Machine code for a CPU, of which nothing is reported, is not optimized.
UNOPTIMIZED = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)


def arguments():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--size", default="vit_b_16", help="of `kcm.models.clip_backbone`")
    add("--image-size", type=int, default=224, help="side in pixels")
    add("--dtype", default="mixed_bfloat16", help="Keras dtype policy")
    add("--rows", nargs="+", type=json.loads, default=ROWS, help='{"devices": 8, ...}')
    add("--topology", help="of TPUs, such as v5e:16x16, instead of virtual devices")
    add("--derive", action="store_true", help="derive hours and cost instead")
    add("--utilization", type=float, default=0.35, help="share of the peak")
    add("--pairs", type=int, default=10_968_539, help="in the dataset")
    add("--epochs", type=int, default=32)
    add(
        "--hardware",
        nargs=4,
        action="append",
        metavar=("NAME", "DEVICES", "TFLOPS", "PRICE"),
        help="of one device: TFLOP/s in bfloat16, and price of an hour",
    )
    add("--results", default="results", help="folder for the JSON file")
    add("--row", type=json.loads, help=argparse.SUPPRESS)
    return parsed.parse_args()


def main():
    options = arguments()
    if options.derive:
        publish_derived(options)
        return
    if options.row is not None:
        print(json.dumps(measure(options, **options.row)))
        return
    rows = []
    for row in options.rows:
        command = [sys.executable, *sys.argv, "--row", json.dumps(row)]
        flags = [os.environ.get("XLA_FLAGS", ""), *UNOPTIMIZED]
        flags += [f"--xla_force_host_platform_device_count={row['devices']}"]
        environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
        found = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        rows.append(row | json.loads(found.stdout.splitlines()[-1]))
        print(table_row(rows[-1]), flush=True)
    name = "jax" if options.topology is None else options.topology.split(":")[0]
    publish(
        f"{options.results}/scaling-{name}.json",
        f"{options.size} at {options.image_size} px, {options.dtype}, compiled for "
        f"{options.topology or 'virtual devices'}",
        [table_row(row) for row in rows],
        options={k: v for k, v in vars(options).items() if k not in ("row", "results")},
        compiled=rows,
    )


def table_row(row):
    """A row as it is printed: per device, sizes in MiB."""
    found = {
        "devices": row["devices"],
        "share a model": row.get("shards", 1),
        "batch": row["batch"],
        "micro-batch": row.get("micro", "whole"),
    }
    for name, size in row["memory"].items():
        found[f"{name} (MiB)"] = round(size / MEBIBYTE)
    for kind, size in row["by kind"].items():
        found[f"{kind} (MiB)"] = f"{size / MEBIBYTE:.1f}"
    found["TFLOP"] = f"{row['flops'] / 1e12:.2f}"
    found["TFLOP by shapes"] = f"{row['flops by shapes'] / 1e12:.2f}"
    return found


# === One compilation ===


def measure(options, devices, batch, shards=1, micro=None):
    """Memory, operations and collectives of one device, from the compiled step."""
    from flops import training_flops

    model = make_model(options, micro)
    start = time.perf_counter()
    found = distribution(device_list(options, devices), shards)
    compiled = lowered_step(model, found, make_batch(options, batch)).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    sent = collectives(compiled.as_text(), devices)
    flops = training_flops(
        options.size, options.image_size, masking=model.masking, context_length=77
    )
    return {
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            # Most outputs are in the place of the arguments, which are donated.
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        "by kind": by_kind(sent),
        "collectives": {" ".join(key): size for key, size in sent.most_common()},
        "flops": compiled.cost_analysis()["flops"],
        # With micro-batches, the towers' forward pass runs twice.
        "flops by shapes": flops * batch / devices * (4 / 3 if micro else 1),
        "seconds to compile": round(seconds, 1),
    }


def device_list(options, count):
    """So many devices: virtual ones, or TPUs of a topology that need not be there."""
    import jax

    if options.topology is None:
        return jax.devices()[:count]
    from jax.experimental import topologies

    found = topologies.get_topology_desc(options.topology, "tpu").devices
    if len(found) != count:
        raise ValueError(
            "`--topology` must have as many devices as every row of `--rows`. "
            f"Received: {options.topology} with {len(found)}, a row with {count}"
        )
    return found


def distribution(devices, shards=1):
    """Data parallel, or with so many devices that share a model."""
    import keras

    import keras_cluster_mask as kcm

    devices = list(devices)
    if shards == 1:
        return keras.distribution.DataParallel(
            devices=devices, auto_shard_dataset=False
        )
    mesh = keras.distribution.DeviceMesh(
        (len(devices) // shards, shards), ["batch", "model"], devices
    )
    return keras.distribution.ModelParallel(
        layout_map=kcm.models.clip_layout_map(mesh),
        batch_dim_name="batch",
        auto_shard_dataset=False,
    )


def make_model(options, micro=None):
    """The compiled model, on one device whatever it will be distributed over."""
    import keras

    import keras_cluster_mask as kcm

    backbone = kcm.models.clip_backbone(
        options.size, options.image_size, dtype=options.dtype
    )
    masking = kcm.ClusterMasking(backbone.vision_encoder.patch_size, 0.5)
    model = kcm.ContrastiveModel.from_backbone(
        backbone, masking, micro_batch_size=micro
    )
    model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.2, global_clipnorm=1.0))
    model.optimizer.build(model.trainable_variables)
    return model


def make_batch(options, batch):
    """Shapes and dtypes of a batch."""
    import jax

    images = batch, options.image_size, options.image_size, 3
    return {
        "images": jax.ShapeDtypeStruct(images, "uint8"),
        "token_ids": jax.ShapeDtypeStruct((batch, 77), "int32"),
    }


def lowered_step(model, distribution, batch):
    """Lowers a training step as Keras's `fit` does, with no data and no copies.

    Args:
        model: A compiled model with a built optimizer, made without a distribution:
            weights of 256 devices would take 256 times the memory here.
        distribution: A `keras.distribution` object to train with.
        batch: Dictionary of `jax.ShapeDtypeStruct`.

    Returns:
        What `jax.jit(...).lower(...)` returns.
    """
    import jax

    # What the optimizer keeps of a weight is named after it, and lies where it does.
    weights = {v.path.replace("/", "_"): v for v in model.trainable_variables}

    def layout(variable):
        name = variable.path.rpartition("/")[2].rpartition("_")[0]
        return distribution.get_variable_layout(weights.get(name, variable))

    def shaped(x, layout):
        sharding = layout.backend_layout
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = tuple(
        [shaped(v, layout(v)) for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )
    data = {
        key: shaped(x, distribution.get_data_layout(x.shape))
        for key, x in batch.items()
    }
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
    with distribution.scope():
        return step.lower(state, data)


# === Hours and cost, from the floating-point operations ===


def derive(method, devices, tflops, price, utilization, pairs, epochs):
    """Speed, time and cost of a training, from its arithmetic alone."""
    from clip_steps import Setting

    speed = devices * tflops * 1e12 * utilization / Setting().arithmetic(method)
    hours = pairs * epochs / speed / 3600
    return {
        "images/s": round(speed),
        "hours": f"{hours:.1f}",
        "cost": round(hours * devices * price),
    }


def publish_derived(options):
    hardware = options.hardware or HARDWARE
    rows = [
        {"devices": f"{count} x {name}", "method": method}
        | derive(
            method,
            int(count),
            float(tflops),
            float(price),
            options.utilization,
            options.pairs,
            options.epochs,
        )
        for name, count, tflops, price in hardware
        for method in ("none", "cluster", "random, two views")
    ]
    publish(
        f"{options.results}/scaling-derived.json",
        f"Derived: {options.pairs:,} pairs, {options.epochs} epochs, vit_b_16 at "
        f"{options.utilization:.0%} of the peak",
        rows,
        hardware=hardware,
        utilization=options.utilization,
        pairs=options.pairs,
        epochs=options.epochs,
    )


if __name__ == "__main__":
    main()
