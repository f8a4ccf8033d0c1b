"""Samples a second of this pipeline, of open_clip's, and of bare JPEG decoding.

    python benchmarks/data_pipeline.py
    python benchmarks/data_pipeline.py --short-side 640
    python benchmarks/data_pipeline.py --data "shards/{00000..00009}.tar"

All read the same shards and cut the same part out of each image (90 to 100 % of the
area, resized to 224 x 224 by bicubic interpolation), with a worker a core. Each runs in
a process of its own, in turn, several times over. The limit decodes each image once,
whole, and does nothing else. Also: the time to the first batch of 1,000 shards, and how
far memory grows from epoch to epoch.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The processes of a data loader warn of what they do not use.
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from made_shards import write_shards
from reporting import parser, publish

CROP = 0.9, 1.0
LIMITS = ("JPEG decoding alone (Pillow)", "JPEG decoding alone (TensorFlow)")
OURS = ("ImageTextBatches", "image_text_dataset")
RIVAL = "open_clip"
FIRST_BATCH = "first batch of 1,000 shards"


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--data", help="tar files of your own: a pattern with braces")
    add("--samples", type=int, default=4000, help="in the shards that are made")
    add("--short-side", type=int, default=256, help="of the images that are made")
    add("--image-size", type=int, default=224)
    add("--batch-size", type=int, default=64)
    add("--epochs", type=int, default=5, help="in a round")
    add("--rounds", type=int, default=3)
    add("--shards", default="results/data_pipeline", help="folder for the shards")
    add("--results", default="results", help="folder for the JSON file")
    add("--row", help=argparse.SUPPRESS)
    options = parsed.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return
    options.data = options.data or write_shards(
        options.shards, options.samples, options.short_side, options.samples // 10
    )
    many = write_shards(options.shards, 16_000, 96, 16)

    runs = {name: [] for name in (*LIMITS, *OURS, RIVAL)}
    for _ in range(options.rounds):
        for name, found in runs.items():
            found.append(in_a_process(name, options.data))
            print(name, found[-1], flush=True)
    first = [in_a_process(FIRST_BATCH, many) for _ in range(options.rounds)]

    limit = max(
        statistics.median(run["samples a second"] for run in runs[name])
        for name in LIMITS
    )
    rival = statistics.median(run["samples a second"] for run in runs[RIVAL])
    rows = []
    for name, found in runs.items():
        speed, processor, growth = (
            statistics.median(run[field] for run in found)
            for field in ("samples a second", "ms a sample", "growth")
        )
        rows.append(
            {
                "pipeline": name,
                "samples a second": round(speed),
                "of the limit": f"{speed / limit:.0%}",
                "times open_clip": f"{speed / rival:.2f}",
                "processor time (ms a sample)": f"{processor:.2f}",
                "memory growth (MiB an epoch)": "" if name in LIMITS else round(growth),
            }
        )
    seconds = statistics.median(run["seconds"] for run in first)
    shards = pathlib.Path(options.data)
    publish(
        f"{options.results}/data_pipeline-{shards.parent.name}.json",
        f"{shards.parent.name}/{shards.name}, crops of {options.image_size} px, "
        f"batches of {options.batch_size}; "
        f"first batch of 1,000 shards after {seconds:.2f} s",
        rows,
        runs=runs,
        first_batch=first,
    )


def in_a_process(name, data):
    command = [sys.executable, *sys.argv, "--row", name, "--data", data]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def measure(name, options):
    if name in LIMITS:
        return limit(name, options)
    if name == FIRST_BATCH:
        return first_batch(options)
    batches, images_of = (
        open_clip(options)
        if name == RIVAL
        else (ours(name, options), lambda b: b["images"])
    )
    samples, memory = 0, []
    start, processor = time.perf_counter(), processor_time()
    for _ in range(options.epochs):
        samples += sum(len(images_of(batch)) for batch in batches)
        memory.append(resident())
    return {
        "samples a second": samples / (time.perf_counter() - start),
        "ms a sample": 1e3 * (processor_time() - processor) / samples,
        "growth": (memory[-1] - memory[1]) / (options.epochs - 2),
    }


def limit(name, options):
    import io
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    import keras_cluster_mask as kcm

    shards = kcm.data.list_shards(options.data)
    files = [
        s["jpg"] for shard in shards for s in kcm.data.read_samples(shard, {"jpg"})
    ]
    if name == LIMITS[0]:

        def decode_all():
            with ThreadPoolExecutor(cores()) as threads:
                for _ in threads.map(lambda x: Image.open(io.BytesIO(x)).load(), files):
                    pass
    else:
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices(files)
        # Only one pixel is returned, so that no image is copied.
        data = data.map(
            lambda x: tf.io.decode_jpeg(x, dct_method="INTEGER_ACCURATE")[0, 0],
            num_parallel_calls=cores(),
        ).batch(64)

        def decode_all():
            for _ in data:
                pass

    start, processor = time.perf_counter(), processor_time()
    decode_all()
    return {
        "samples a second": len(files) / (time.perf_counter() - start),
        "ms a sample": 1e3 * (processor_time() - processor) / len(files),
        "growth": 0,
    }


def ours(name, options):
    import keras_cluster_mask as kcm

    return getattr(kcm.data, name)(
        options.data,
        kcm.data.CLIPTokenizer.from_open_clip(),
        options.image_size,
        options.batch_size,
        training=True,
        seed=0,
        crop_scale=CROP,
        # As many as open_clip's.
        shuffle_buffer=1000,
    )


def open_clip(options):
    """The training pipeline of open_clip, with a worker process a core."""
    import open_clip as package
    import torch
    from open_clip_train import data

    import keras_cluster_mask as kcm

    torch.set_num_threads(1)
    shards = kcm.data.list_shards(options.data)
    # Its own buffer is of 5,000: as many as ours, in its two processes together.
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 500
    arguments = argparse.Namespace(
        train_data=options.data,
        train_num_samples=sum(
            1 for shard in shards for _ in kcm.data.read_samples(shard, {"txt"})
        ),
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=options.batch_size,
        workers=cores(),
        world_size=1,
        seed=0,
    )
    found = data.get_wds_dataset(
        arguments,
        package.image_transform(options.image_size, is_train=True),
        is_train=True,
        floor=True,
        tokenizer=package.get_tokenizer("ViT-B-32"),
    )
    return found.dataloader, lambda batch: batch[0]


def first_batch(options):
    import keras_cluster_mask as kcm

    tokenizer = kcm.data.CLIPTokenizer.from_open_clip()
    start = time.perf_counter()
    batches = kcm.data.ImageTextBatches(
        options.data, tokenizer, options.image_size, options.batch_size, training=True
    )
    next(iter(batches))
    return {"seconds": time.perf_counter() - start}


def resident():
    """MiB in memory of this process and its children."""
    total = 0
    for process in (os.getpid(), *children()):
        with contextlib.suppress(OSError, IndexError):
            status = pathlib.Path(f"/proc/{process}/status").read_text()
            total += int(status.partition("VmRSS:")[2].split()[0]) / 1024
    return total


def processor_time():
    """Seconds that this process and its children, running or not, have computed."""
    total = sum(os.times()[:4])
    for process in children():
        with contextlib.suppress(OSError):
            fields = (
                pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
            )
            user, system = fields.split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def children():
    found = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [*map(int, found.split())]


def cores():
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
