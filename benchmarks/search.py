"""How long a search takes, exact and by faiss, and how much the latter finds.

    python benchmarks/search.py
    python benchmarks/search.py --rows 100000 --graph-rows 0

Embeddings are drawn: points around many centres, whose neighbours have a cosine of
about 0.5, and queries farther out from the same centres, as texts are. What is timed is
the search in arrays, one query at a time and all together, not the model. "cells" is
what `approximate=True` takes, an inverted file of faiss; "graph" is faiss's HNSW with
its usual 32 neighbours, for comparison, at several breadths of its search.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import statistics
import time

import keras
import numpy as np
from reporting import parser, publish

from keras_cluster_mask.search.nearest import Cells, nearest

CENTERS = 2000
BREADTHS = 32, 64, 128


def drawn_embeddings(count, centers, spread, rng):
    """`(count, d)` float32 rows around centres, L2-normalised."""
    width = centers.shape[1]
    rows = np.empty((count, width), "float32")
    for start in range(0, count, 10_000):
        part = rows[start : start + 10_000]
        rng.standard_normal(out=part, dtype="float32")
        part *= spread / width**0.5
        part += centers[rng.integers(0, len(centers), len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def found_by(search, queries, k, rounds):
    """The rows found, and the milliseconds a query takes, alone and among all."""
    alone, together = [], []
    for _ in range(rounds):
        for query in queries[:20]:
            start = time.perf_counter()
            search(query[None], k)
            alone.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = search(queries, k)
        together.append((time.perf_counter() - start) / len(queries))
    return found, [1000 * statistics.median(each) for each in (alone, together)]


def rows_by(function):
    """A search that gives the rows of each query as an array."""
    return lambda queries, k: [numbers for numbers, _ in function(queries, k)]


def searches(rows, graph):
    """Triples of a name, the seconds it took to make, and a search."""
    yield "exact", 0.0, rows_by(lambda queries, k: nearest(rows, queries, k))
    start = time.perf_counter()
    cells = Cells(rows)
    yield "cells", time.perf_counter() - start, rows_by(cells.nearest)
    if not graph:
        return
    import faiss

    start = time.perf_counter()
    index = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.add(rows)
    seconds = time.perf_counter() - start
    for breadth in BREADTHS:
        index.hnsw.efSearch = breadth
        name = f"graph, breadth {breadth}"
        yield name, seconds, lambda queries, k: index.search(queries, k)[1]


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    add("--graph-rows", type=int, default=100_000, help="graphs up to so many rows")
    add("--queries", type=int, default=100)
    add("--width", type=int, default=512)
    add("-k", type=int, default=10)
    add("--rounds", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    rng = np.random.default_rng(options.seed)
    centers = drawn_embeddings(CENTERS, np.zeros((1, options.width), "float32"), 1, rng)
    queries = drawn_embeddings(options.queries, centers, 1.5, rng)
    table = []
    progress = keras.utils.Progbar(len(options.rows), unit_name="size")
    for count in options.rows:
        rows = drawn_embeddings(count, centers, 1.0, rng)
        for name, seconds, search in searches(rows, count <= options.graph_rows):
            found, (alone, together) = found_by(
                search, queries, options.k, options.rounds
            )
            if name == "exact":
                exact = found
            shared = [len({*a} & {*b}) / options.k for a, b in zip(exact, found)]
            table.append(
                {
                    "rows": f"{count:,}",
                    "search": name,
                    "made in (s)": f"{seconds:.1f}",
                    "a query alone (ms)": f"{alone:.2f}",
                    "a query among all (ms)": f"{together:.2f}",
                    f"recall@{options.k} of exact": f"{np.mean(shared):.3f}",
                }
            )
        progress.add(1)
    publish(
        f"{options.results}/search.json",
        f"{options.queries} queries, {options.width} wide, around {CENTERS} centres",
        table,
        options=vars(options),
    )


if __name__ == "__main__":
    main()
