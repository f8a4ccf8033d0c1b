"""Time and memory of recall over many embeddings.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --items 20000

A pair is a random direction and a noisy copy of it, so that half of the partners are
among the first ten.
"""

import os
import resource
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from reporting import parser, publish

import keras_cluster_mask as kcm

# Of each number, relative to that of the direction.
NOISE = 6.0


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--items", type=int, default=100_000, help="images, and as many texts")
    add("--width", type=int, default=512, help="of the embeddings")
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    rng = np.random.default_rng(0)
    shape = options.items, options.width
    images, noise = (rng.normal(size=shape).astype("float32") for _ in range(2))
    images = unit(images)
    texts = unit(images + NOISE * unit(noise))
    # What is loaded when it is first used.
    kcm.evaluation.retrieval_recall(images[:100], texts[:100])
    before = peak()
    start = time.perf_counter()
    found = kcm.evaluation.retrieval_recall(images, texts)
    row = {
        "seconds": round(time.perf_counter() - start, 1),
        "memory of the call (MiB)": round(peak() - before),
        "memory of the process (MiB)": round(peak()),
        **{key: round(value, 3) for key, value in found.items()},
    }
    publish(
        f"{options.results}/retrieval.json",
        f"{options.items:,} images and texts of {options.width} numbers, both ways",
        [row],
    )


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def peak():
    """The peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
