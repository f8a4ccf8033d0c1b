"""Compares token ids and speed with open_clip's tokenizer.

    python benchmarks/token_parity.py
    python benchmarks/token_parity.py --captions 3000
    python benchmarks/token_parity.py --data "shards/train-*.tar"   # more real captions

Captions are of three kinds, a third each: real ones and new ones out of their words,
generated unicode, and fuzz; see `caption_kinds.py`. Both tokenizers are timed in turn
on all captions of a kind, in batches of 256, all of which both have met before the
clock starts: open_clip keeps every word it has met, `tokenizers` 10,000 of them.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")  # open_clip imports it anyway.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import random
import statistics
import sys
from pathlib import Path

import keras
import numpy as np
import open_clip
from caption_kinds import fuzz_captions, recombined, unicode_captions
from reporting import parser, publish
from timing import interleaved, ratio

import keras_cluster_mask as kcm

IMAGES = Path(__file__).resolve().parents[1] / "datasets" / "images" / "*.tar"
BATCH_SIZE = 256
SHOWN = 10  # differing captions of a kind


def captions_of_kinds(sources, count, seed):
    """Dictionary of lists, `count` captions in all, in an order of no meaning."""
    thirds = [count - 2 * (count // 3), count // 3, count // 3]
    rng = random.Random(seed)
    kinds = {
        "real": recombined(sources, thirds[0], rng),
        "unicode": unicode_captions(thirds[1], rng),
        "fuzz": fuzz_captions(sources, thirds[2], rng),
    }
    for captions in kinds.values():
        rng.shuffle(captions)
    return kinds


def batches(captions):
    for start in range(0, len(captions), BATCH_SIZE):
        yield captions[start : start + BATCH_SIZE]


def compare(captions, tokenizer, reference, progress):
    """The number of ids, of captions that fill a row, and those whose ids differ."""
    ids = full = 0
    differing = []
    for batch in batches(captions):
        actual, expected = tokenizer(batch), reference(batch).numpy()
        same = (actual == expected).all(axis=1)
        differing += [batch[row] for row in np.flatnonzero(~same)]
        ids += np.count_nonzero(expected)
        full += np.count_nonzero(expected[:, -1])
        progress.add(len(batch))
    return int(ids), int(full), differing


def timings(captions, tokenizer, reference, rounds):
    """Seconds of each round for all captions, by who cuts them into tokens."""

    def passing(function, parallel):
        def run():
            # Importing open_clip turns the threads of `tokenizers` off.
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
            for batch in batches(captions):
                function(batch)

        return run

    functions = {
        "one thread": passing(tokenizer, "false"),
        "default": passing(tokenizer, "true"),
        "open_clip": passing(reference, "false"),
    }
    return interleaved(functions, rounds)


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--captions", type=int, default=100_000, help="how many, all kinds together")
    add("--seed", type=int, default=0)
    add("--data", help="shards of more real captions, such as 'train-*.tar'")
    add("--rounds", type=int, default=5, help="of the timing; 0 for none")
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    patterns = [str(IMAGES), *([options.data] if options.data else [])]
    sources = list(dict.fromkeys(kcm.data.read_captions(patterns)))
    kinds = captions_of_kinds(sources, options.captions, options.seed)
    tokenizer = kcm.data.CLIPTokenizer.from_open_clip()
    reference = open_clip.get_tokenizer("ViT-B-32")

    rows, differing, seconds = [], {}, {}
    progress = keras.utils.Progbar(options.captions, unit_name="caption")
    for kind, captions in kinds.items():
        ids, full, differing[kind] = compare(captions, tokenizer, reference, progress)
        row = {"captions": kind, "number": len(captions), "77 or longer": full}
        row["different"] = len(differing[kind])
        rows.append({**row, "tokens": ids})
    for row in rows if options.rounds else []:
        kind = row["captions"]
        took = timings(kinds[kind], tokenizer, reference, options.rounds)
        seconds[kind] = took
        for name in took:
            speed = row["tokens"] / statistics.median(took[name])
            row[f"{name} (tokens/s)"] = f"{speed:,.0f}"
        for name in ("one thread", "default"):
            row[f"{name} / open_clip"] = f"{ratio(took, 'open_clip', name):.2f}"

    for kind, captions in differing.items():
        for caption in captions[:SHOWN]:
            print(f"different, {kind}: {caption!a}")
    total = sum(map(len, differing.values()))
    original = min(len(sources), len(kinds["real"]))
    publish(
        f"{options.results}/token_parity.json",
        f"{options.captions:,} captions, {original:,} of them as they stand in shards; "
        f"{total} differ from open_clip's",
        rows,
        options=vars(options),
        differing=differing,
        seconds=seconds,
    )
    sys.exit(total > 0)


if __name__ == "__main__":
    main()
