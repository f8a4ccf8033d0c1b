"""Images a second of this pipeline, of open_clip's, and of bare JPEG decoding.

    python benchmarks/data_pipeline.py
    python benchmarks/data_pipeline.py --short-side 640
    python benchmarks/data_pipeline.py --data "shards/{00000..00009}.tar"

All read the same shards and cut the same part out of each image (90 to 100 % of the
area, resized to 224 x 224 by bicubic interpolation). Each runs in a process of its own,
in turn, several times over, after an epoch that is not counted. "JPEG decoding alone"
is an upper bound: it decodes each image once, whole, with one thread per core.

The speed on larger machines is derived from the processor time per image of the workers
and of their parent; it is not measured. A parent computes in one thread at a time, and
all cores together do the rest.

Also: the memory of a worker process, if the script imports Keras at its top or when it
needs it; and the time to the first batch of 1,000 indexed shards, from the start of an
epoch and at 90 % of it.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The processes of a data loader warn of what they do not use.
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from reporting import parser, publish, table

# A worker process imports what this script imports at its top.
if os.environ.get("KERAS_AT_TOP"):
    import keras  # noqa: F401

CROP = 0.9, 1.0
PARENT, CHILDREN = "parent (ms an image)", "workers (ms an image)"
RSS, PSS = "RSS of a worker (MiB)", "PSS of a worker (MiB)"
# Rows of the first table.
LIMIT = "JPEG decoding alone (Pillow)"
NONE, ONE, TWO = "0 workers", "1 worker", "2 workers"
TOP = "2 workers, Keras at the top of the script"
RIVAL = "open_clip"
SPEEDS = LIMIT, NONE, ONE, TWO, TOP, RIVAL
# Others.
FIRST = "first batch of many shards (s)"
LATE = "first batch at 90 % of an epoch (s)"
# Cores, and processes that train on them.
MACHINES = (16, 1), (96, 1), (96, 8)


def main():
    options = arguments()
    if options.row:
        print(json.dumps(ROWS[options.row](options)))
        return
    # Worker processes import only what stands at the top.
    from made_shards import write_shards

    import keras_cluster_mask as kcm

    data = options.data or write_shards(
        options.shards, options.samples, options.short_side, options.samples // 10
    )
    many = write_shards(options.shards, options.many * 16, 96, 16)
    others = {FIRST: many, LATE: many}
    # Builds what is missing of the index.
    samples = {
        x: kcm.data.image_text_dataset(x, None, 224, training=False).num_samples
        for x in (data, *others.values())
    }

    runs = {name: [] for name in ROWS}
    for _ in range(options.rounds):
        for name, found in runs.items():
            read = others.get(name, data)
            command = [sys.executable, *sys.argv, "--row", name, "--data", read]
            command += ["--samples", str(samples[read])]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[-1], flush=True)
    medians = {
        name: {
            field: round(statistics.median(each[field] for each in found), 3)
            for field in found[0]
        }
        for name, found in runs.items()
    }
    limit, rival = (medians[name]["images/s"] for name in (LIMIT, RIVAL))
    rows = [
        {
            "pipeline": name,
            **medians[name],
            "of the limit": f"{medians[name]['images/s'] / limit:.0%}",
            "times open_clip": f"{medians[name]['images/s'] / rival:.2f}",
        }
        for name in SPEEDS
    ]
    derived = [derive(medians[TWO], *machine) for machine in MACHINES]
    rest = [{"measured": name, **medians[name]} for name in others]
    print(f"\n{table(derived)}\n\n{table(rest)}")
    shards = pathlib.Path(data)
    publish(
        f"{options.results}/data_pipeline-{shards.parent.name}.json",
        f"{shards.parent.name}/{shards.name}, crops of {options.image_size} px, "
        f"batches of {options.batch_size}; {options.many:,} shards",
        rows,
        derived=derived,
        rest=rest,
        runs=runs,
        options=vars(options),
    )


def derive(measured, cores, processes):
    """What follows for a machine from the processor time for each image."""
    parents = processes * 1e3 / measured[PARENT]
    all_cores = cores * 1e3 / (measured[PARENT] + measured[CHILDREN])
    return {
        "derived": f"{cores} cores, {processes} parents with workers",
        "images/s": round(min(parents, all_cores)),
        "limited by": "parents" if parents < all_cores else "cores",
    }


def arguments():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--data", help="tar files of your own: a pattern with braces")
    add("--samples", type=int, default=4000, help="in the shards that are made")
    add("--short-side", type=int, default=256, help="of the images that are made")
    add("--image-size", type=int, default=224)
    add("--batch-size", type=int, default=64)
    add("--epochs", type=int, default=5, help="in a round")
    add("--rounds", type=int, default=3)
    add("--many", type=int, default=1000, help="shards for the time to the first batch")
    add("--shards", default="results/data_pipeline", help="folder for the shards")
    add("--results", default="results", help="folder for the JSON file")
    add("--row", help=argparse.SUPPRESS)
    return parsed.parse_args()


# === Rows, each in a process of its own ===


def decode(options):
    """Decodes every image, and nothing else."""
    import io
    from concurrent.futures import ThreadPoolExecutor

    import braceexpand
    from PIL import Image

    files = []
    for shard in braceexpand.braceexpand(options.data):
        with tarfile.open(shard) as archive:
            files += [
                archive.extractfile(each).read()
                for each in archive
                if each.name.endswith(".jpg")
            ]
    start, processor = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(cores()) as threads:
        for _ in threads.map(lambda x: Image.open(io.BytesIO(x)).load(), files):
            pass
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return {
        "images/s": len(files) / seconds,
        PARENT: 1e3 * processor / len(files),
        **dict.fromkeys((CHILDREN, RSS, PSS), 0),
    }


def ours(options, num_workers, keras_at_top=""):
    # Only the workers import this script again.
    os.environ["KERAS_AT_TOP"] = keras_at_top
    batches = iter(dataset_of(options, num_workers)())
    return speed(batches, lambda batch: batch["images"], options)


def open_clip(options):
    """The training pipeline of open_clip, with a worker process a core."""
    import open_clip as package
    import torch
    from open_clip_train import data

    torch.set_num_threads(1)
    # Its own buffer of 5,000 would hold all samples, in each process.
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 500
    found = data.get_wds_dataset(
        argparse.Namespace(
            train_data=options.data,
            train_num_samples=options.samples,
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            batch_size=options.batch_size,
            workers=cores(),
            world_size=1,
            seed=0,
        ),
        package.image_transform(options.image_size, is_train=True),
        is_train=True,
        floor=True,
        tokenizer=package.get_tokenizer("ViT-B-32"),
    )
    epochs = itertools.repeat(found.dataloader)
    return speed(itertools.chain.from_iterable(epochs), lambda batch: batch[0], options)


def speed(batches, images_of, options):
    """Reads an epoch, and then measures several."""
    per_epoch = options.samples // options.batch_size
    for _ in itertools.islice(batches, per_epoch):
        pass
    images, start = 0, time.perf_counter()
    parent, workers = time.process_time(), workers_time()
    for batch in itertools.islice(batches, options.epochs * per_epoch):
        images += len(images_of(batch))
    seconds = time.perf_counter() - start
    parent, workers = time.process_time() - parent, workers_time() - workers
    found = {
        "images/s": images / seconds,
        PARENT: 1e3 * parent / images,
        CHILDREN: 1e3 * workers / images,
    }
    files = [f"{w.pid}/smaps_rollup" for w in multiprocessing.active_children()]
    for name in (RSS, PSS):
        memory = [mebibytes(file, name[:3].capitalize()) for file in files]
        found[name] = statistics.fmean(memory or [0])
    return found


def first_batch(options, share=0.0):
    """The time to the first batch, or to that after a share of an epoch."""
    make = dataset_of(options)
    start = time.perf_counter()
    dataset = make()
    dataset.start = int(share * len(dataset))
    next(iter(dataset))
    return {"value": time.perf_counter() - start}


def dataset_of(options, num_workers=0):
    """A function that makes the dataset, when all that it needs is imported."""
    import keras_cluster_mask as kcm

    return functools.partial(
        kcm.data.image_text_dataset,
        options.data,
        kcm.data.CLIPTokenizer.from_open_clip(),
        options.image_size,
        options.batch_size,
        training=True,
        crop_scale=CROP,
        num_workers=num_workers,
    )


def workers_time():
    """Seconds that the worker processes have computed."""
    total = 0
    for worker in multiprocessing.active_children():
        stat = pathlib.Path(f"/proc/{worker.pid}/stat").read_text()
        total += sum(map(int, stat.rpartition(")")[2].split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def mebibytes(file, field):
    """An entry of a file below `/proc` about memory."""
    content = pathlib.Path(f"/proc/{file}").read_text()
    return int(content.partition(f"{field}:")[2].split()[0]) / 1024


def cores():
    return len(os.sched_getaffinity(0))


ROWS = {
    LIMIT: decode,
    NONE: functools.partial(ours, num_workers=0),
    ONE: functools.partial(ours, num_workers=1),
    TWO: functools.partial(ours, num_workers=2),
    TOP: functools.partial(ours, num_workers=2, keras_at_top="yes"),
    RIVAL: open_clip,
    FIRST: first_batch,
    LATE: functools.partial(first_batch, share=0.9),
}


if __name__ == "__main__":
    main()
