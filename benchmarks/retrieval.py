"""Time and memory of recall over many embeddings.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --items 20000

Images and texts of three models, each in a process of its own: one that has learned
nothing (random directions), one in between, and one that finds most partners. A pair is
a random direction and a noisy copy of it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from reporting import parser, publish

# Noise of each number, relative to that of the direction.
MODELS = {"untrained": None, "middling": 6.0, "good": 3.0}


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--items", type=int, default=100_000, help="images, and as many texts")
    add("--width", type=int, default=512, help="of the embeddings")
    add("--results", default="results", help="folder for the JSON file")
    add("--model", help=argparse.SUPPRESS)
    options = parsed.parse_args()
    if options.model:
        print(json.dumps(measure(options.model, options.items, options.width)))
        return
    rows = []
    for name in MODELS:
        command = [sys.executable, *sys.argv, "--model", name]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"model": name, **json.loads(found.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    publish(
        f"{options.results}/retrieval.json",
        f"{options.items:,} images and texts of {options.width} numbers, both ways",
        rows,
    )


def measure(name, items, width):
    import numpy as np

    import keras_cluster_mask as kcm

    rng = np.random.default_rng(0)

    def directions():
        found = rng.normal(size=(items, width)).astype("float32")
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    images, texts = directions(), directions()
    if MODELS[name] is not None:
        texts *= MODELS[name]
        texts += images
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    recall = kcm.evaluation.retrieval_recall
    # What is loaded when it is first used.
    recall(images[:100], texts[:100])
    before = peak()
    start = time.perf_counter()
    found = recall(images, texts)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "memory of it (MiB)": round(peak() - before),
        "memory of the process (MiB)": round(peak()),
        "text_to_image_recall@1": round(found["text_to_image_recall@1"], 3),
        "text_to_image_recall@10": round(found["text_to_image_recall@10"], 3),
    }


def peak():
    """The peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
