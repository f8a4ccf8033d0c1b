"""How damaged shards are read.

    python benchmarks/mutated_shards.py --shards 2000 --seed 0

Writes small shards of each format (tar, tar with long names, TFRecord, CSV, TSV, JSON
lines, Parquet) and damages a copy of one in each round. The copy is read by `check`, in
evaluation, and in an epoch of training. One process does this for many shards; it ends
if it takes too long for one, and a new one continues with the next. The counts must add
up:

- `check`, evaluation and training find the same samples, and leave out as many for the
  same reasons.
- A sample is lost if all of its bytes are still there and it is neither given, nor
  counted as broken, nor its shard counted as damaged.
- A sample is silently wrong if its caption or image is not its own, although the file
  still holds all bytes of the sample under its key, and nothing else under this key.
"""

import collections
import csv
import dataclasses
import faulthandler
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import tarfile
import tempfile
import time
import traceback
import warnings
from concurrent import futures
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from PIL import Image
from reporting import parser, publish
from tqdm import tqdm

from keras_cluster_mask.data import check, image_text_dataset

SAMPLES = 12
SIZE = 24
# Rows in a group of a Parquet file.
GROUP = 3
# A process that takes longer for a shard ends.
SECONDS = 60
COLUMNS = (
    *("given", "broken", "damaged", "refused", "changed", "wrong", "lost"),
    "slowest (s)",
)
# The documented error about a shard without a readable pair.
NOTHING = "`source` must hold samples with"


@dataclasses.dataclass
class Piece:
    """Bytes that a sample needs.

    Attributes:
        whole: bytes.
        label: bytes that only this piece holds: its key.
        place: int. Where in the file `whole` is read, if this is fixed. Then `label` is
            the end of the file.
    """

    whole: bytes
    label: bytes
    place: int | None = None

    def is_in(self, content):
        if self.place is not None:
            at_place = content.startswith(self.whole, self.place)
            return at_place and content.endswith(self.label)
        # Rows of a table start after a line break.
        return self.whole in b"\n" + content

    def is_intact_in(self, content):
        """Whether it is there, and nothing else has its label."""
        times = (b"\n" + content).count
        is_only = self.place is not None or times(self.whole) == times(self.label)
        return is_only and self.is_in(content)


# The captions (tuple of str), the image (array), and all `Piece`s that hold them.
Sample = collections.namedtuple("Sample", "captions image pieces")
# What a batch holds of a sample.
Row = collections.namedtuple("Row", "key captions image path")
# A shard as it was written: its format, its bytes, where each member, record, row or
# group starts and ends, where each block does, and a dict from keys to `Sample`s.
Base = collections.namedtuple("Base", "name content spans blocks samples")


# === Shards ===


@functools.cache
def bases(seed, folder):
    """Pairs of shards of each format; no key or caption is in both.

    Args:
        seed: int.
        folder: str. Images that tables name are written to its folder `images`, for
            tables in other folders in it.
    """
    images = Path(folder) / "images"
    images.mkdir(exist_ok=True)
    found = []
    for name, (write, block, num_captions) in FORMATS.items():
        halves = []
        for half in range(2):
            # Too long for the header of a tar.
            stem = "n" * 120 if name == "pax.tar" else ""
            pairs = [*_pairs(seed, half, stem, num_captions)]
            for key, ending, _, image in pairs:
                (images / f"{key}.{ending}").write_bytes(image)
            content, spans, pieces = write(pairs)
            samples = {
                key: Sample(captions, np.array(Image.open(io.BytesIO(image))), own)
                for (key, _, captions, image), own in zip(pairs, pieces)
            }
            ends = [*range(0, len(content), block), len(content)]
            blocks = [*itertools.pairwise(ends)]
            halves.append(Base(name, content, spans, blocks, samples))
        found.append(halves)
    return found


def _pairs(seed, half, stem, num_captions):
    """Keys, endings, captions and images: noise about a color of its own."""
    rng = np.random.default_rng([seed, half])
    for index in range(half * SAMPLES, half * SAMPLES + SAMPLES):
        levels = 40 + 80 * np.array([index % 3, index // 3 % 3, index // 9])
        image = levels + rng.integers(-8, 9, (SIZE, SIZE, 3))
        ending, format = (("png", "PNG"), ("jpg", "JPEG"))[index % 2]
        file = io.BytesIO()
        Image.fromarray(image.astype("uint8")).save(file, format)
        # Each third needs quotes in a table.
        more = ', "quoted"\nand broken' if index % 3 == 0 else ""
        captions = f"photo number {index}{more}", f"the other text of {index}"
        yield f"{stem}key{index:04}", ending, captions[:num_captions], file.getvalue()


def _tar(pairs):
    file = io.BytesIO()
    ends, pieces = [0], []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, ending, captions, image in pairs:
            pieces.append([])
            for end, content in (("txt", captions[0].encode()), (ending, image)):
                member = tarfile.TarInfo(f"{key}.{end}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                whole = file.getvalue()[ends[-1] : archive.offset]
                pieces[-1].append(Piece(whole, member.name.encode()))
                ends.append(archive.offset)
    return file.getvalue(), [*itertools.pairwise(ends)], pieces


def _tfrecord(pairs):
    import tensorflow as tf

    def feature(*values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    ends = [0]
    with tempfile.NamedTemporaryFile() as file:
        with tf.io.TFRecordWriter(file.name) as writer:
            for key, _, captions, image in pairs:
                features = {
                    "__key__": feature(key.encode()),
                    "txt": feature(*(caption.encode() for caption in captions)),
                    "image": feature(image),
                }
                features = tf.train.Features(feature=features)
                record = tf.train.Example(features=features).SerializeToString()
                writer.write(record)
                # The length, and the checksums of the length and of the content.
                ends.append(ends[-1] + len(record) + 16)
        content = Path(file.name).read_bytes()
    spans = [*itertools.pairwise(ends)]
    wholes = (content[start:end] for start, end in spans)
    return content, spans, [[Piece(w, p[0].encode())] for w, p in zip(wholes, pairs)]


def _table(delimiter, pairs):
    def line(*cells):
        file = io.StringIO()
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerow(cells)
        return file.getvalue().encode()

    lines = [line(key, f"../images/{key}.{end}", *c) for key, end, c, _ in pairs]
    return _from_lines(pairs, lines, line("key", "file_name", "caption"))


def _json_lines(pairs):
    rows = (
        {"key": key, "file_name": f"../images/{key}.{ending}", "captions": captions}
        for key, ending, captions, _ in pairs
    )
    return _from_lines(pairs, [json.dumps(row).encode() + b"\n" for row in rows])


def _from_lines(pairs, lines, head=b""):
    ends = itertools.accumulate(map(len, lines), initial=len(head))
    pieces = []
    for (key, *_), line in zip(pairs, lines):
        before, key, _ = (b"\n" + line).partition(key.encode())
        pieces.append([Piece(b"\n" + line, before + key)])
    return head + b"".join(lines), [*itertools.pairwise(ends)], pieces


def _parquet(pairs):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"key": key, "captions": list(c), "image": i} for key, _, c, i in pairs]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=GROUP)
    content = file.getvalue()
    found = pq.ParquetFile(file).metadata
    groups = [found.row_group(number) for number in range(found.num_row_groups)]
    # The footer follows the groups; its length and a name are the last 8 bytes.
    ends = [group.column(0).dictionary_page_offset for group in groups]
    ends += [len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content)]
    spans = [*itertools.pairwise(ends)]
    footer = content[ends[-2] :]
    pieces = [Piece(content[start:end], footer, start) for start, end in spans]
    return content, spans, [[pieces[i // GROUP]] for i in range(len(pairs))]


# For each the function that writes it, the size of its blocks, and how many captions it
# has.
FORMATS = {
    "tar": (_tar, 512, 1),
    "pax.tar": (_tar, 512, 1),
    "tfrecord": (_tfrecord, 512, 2),
    "csv": (functools.partial(_table, ","), 64, 1),
    "tsv": (functools.partial(_table, "\t"), 64, 1),
    "jsonl": (_json_lines, 64, 2),
    "parquet": (_parquet, 512, 2),
}


# === Damage ===

MUTATIONS = (
    *("one bit", "several bits", "cut", "swapped blocks", "swapped members"),
    *("repeated blocks", "zeroed blocks", "inserted garbage", "exchanged endings"),
)


def damaged(mutation, rng, base, other):
    """The content of a shard with one of `MUTATIONS`."""
    content, spans, blocks = base.content, base.spans, base.blocks
    place = rng.randrange(len(content))
    start, end = rng.choice(blocks)
    block = blocks[0][1]
    match mutation:
        case "one bit":
            return _flipped(rng, content, 1)
        case "several bits":
            return _flipped(rng, content, rng.randint(2, 16))
        case "cut":
            return content[:place]
        case "swapped blocks":
            return _swapped(rng, content, blocks)
        case "swapped members":
            return _swapped(rng, content, spans)
        case "repeated blocks":
            first, last = rng.choice(rng.choice([spans, blocks]))
            return content[:start] + content[first:last] + content[start:]
        case "zeroed blocks":
            end = min(end + block * rng.randrange(4), len(content))
            return content[:start] + bytes(end - start) + content[end:]
        case "inserted garbage":
            size = rng.choice([1, block, rng.randint(1, 3 * block)])
            return content[:place] + rng.randbytes(size) + content[place:]
        case "exchanged endings":
            # At its own place, or between two members.
            place = rng.choice([place, rng.choice(spans)[0]])
            start = rng.choice([place, rng.choice(other.spans)[0]])
            return content[:place] + other.content[start:]


def _flipped(rng, content, count):
    content = bytearray(content)
    for _ in range(count):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _swapped(rng, content, spans):
    (a, b), (c, d) = sorted(rng.sample(spans, 2))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


# === Reading and judging ===


def read(path, batch_size=5, training=False):
    """Reads a shard once.

    Returns:
        tuple: a list of `Row`; a dict from reasons to the number of broken samples; and
        how many samples are in the index.
    """
    dataset = image_text_dataset(
        path,
        None,
        SIZE,
        batch_size,
        training,
        format="grain",
        max_skipped=1,
        include_captions="all",
        include_keys=True,
        include_paths=True,
    )
    rows = []
    for batch in itertools.islice(dataset, len(dataset)):
        texts = ([c.decode("utf-8", "replace") for c in cs] for cs in batch["captions"])
        keys = (key.decode("utf-8", "replace") for key in batch["keys"])
        entries = zip(keys, map(tuple, texts), batch["images"], batch["paths"])
        rows.extend(itertools.starmap(Row, entries))
    return rows, dataset.skipped.by_reason, dataset.num_samples


def judge(base, other, content, path):
    """Reads damaged content in all ways.

    Returns:
        dict: the counts of `COLUMNS`, and `"errors"`, a list of str.
    """
    path.write_bytes(content)
    samples = {**base.samples, **other.samples}
    found = dict.fromkeys(COLUMNS, 0)
    errors = found["errors"] = []

    def expect(equal, what):
        if not equal:
            errors.append(what)

    checked = check(path, decode=True)
    reasons = checked["by_reason"]
    found["broken"] = checked["broken"]
    found["damaged"] = reasons.get("damaged shard", 0)
    try:
        rows, skipped, in_index = read(path)
    except ValueError as error:
        if not str(error).startswith(NOTHING):
            raise
        rows, skipped, in_index = [], reasons, 0
        found["refused"] = 1
    found["given"] = len(rows)
    expect(checked["samples"] == len(rows), f"{len(rows)} given, check: {checked}")
    expect(reasons == skipped, f"skipped {skipped}, check: {checked}")
    structural = check(path)
    unreadable = checked["broken"] - structural["broken"]
    expect(in_index == structural["samples"], f"{in_index}, check: {structural}")
    expect(in_index == len(rows) + unreadable, f"{in_index} indexed, check: {checked}")
    if rows:
        trained, skipped, _ = read(path, in_index, training=True)
        expect(len(trained) == in_index, f"trained on {len(trained)} of {in_index}")
        expect({r.key for r in trained} == {r.key for r in rows}, "other keys trained")
        expect(reasons == skipped, f"skipped {skipped} in training, check: {checked}")

    for row in rows:
        verdict = _verdict(base, samples, content, row)
        if verdict:
            found[verdict] += 1
    if not found["damaged"]:
        broken = [sample["key"] for sample in checked["first_broken"]]
        captions = "".join(itertools.chain.from_iterable(r.captions for r in rows))
        missing = sum(
            # Between two quotes, a row of a table is a part of a caption.
            all(p.is_in(content) and p.whole not in captions.encode() for p in pieces)
            for key, (_, _, pieces) in samples.items()
            if key not in {row.key for row in rows} | {*broken}
        )
        # The key of a broken row may be unreadable.
        found["lost"] = max(missing - broken.count(None), 0)
    return found


def _verdict(base, samples, content, row):
    """None for a sample as it was, else `"wrong"`; `"changed"` if its bytes were."""
    sample = samples.get(row.key, Sample((), None, ()))
    if row.captions == sample.captions and np.array_equal(row.image, sample.image):
        return None
    is_intact = sample.pieces and all(p.is_intact_in(content) for p in sample.pieces)
    # Records have checksums.
    return "wrong" if is_intact or base.name == "tfrecord" else "changed"


# === Runs ===


def one(number, seed, folder):
    """Damages and reads a shard; returns its format, the mutation and the counts."""
    warnings.simplefilter("ignore")
    formats = bases(seed, folder)
    mutation = MUTATIONS[number % len(MUTATIONS)]
    base, other = formats[number // len(MUTATIONS) % len(formats)]
    content = damaged(mutation, random.Random(f"{seed} {number}"), base, other)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as own:
        try:
            found = judge(base, other, content, Path(own) / f"{number}.{base.name}")
        except Exception:
            found = {"errors": [traceback.format_exc()]}
    faulthandler.cancel_dump_traceback_later()
    found["slowest (s)"] = round(time.perf_counter() - start, 2)
    return base.name, mutation, found


def run(numbers, seed, folder):
    """Damages and reads shards.

    Args:
        numbers: Sequence of int, each of which is a shard and a mutation.
        seed: int.
        folder: str, for temporary files.

    Returns:
        tuple: rows of a table, and a list of what must not be.
    """
    context = multiprocessing.get_context("spawn")
    pool, failures = None, []
    rows = {
        label: {"damage or format": label, "shards": 0} | dict.fromkeys(COLUMNS, 0)
        for label in (*MUTATIONS, *FORMATS, "all")
    }
    for number in tqdm(numbers, unit=" shards"):
        pool = pool or futures.ProcessPoolExecutor(1, context)
        try:
            name, mutation, found = pool.submit(one, number, seed, folder).result()
        except futures.process.BrokenProcessPool:
            failures.append((number, "crash or hang, with a traceback above"))
            pool = None
            continue
        errors = found.pop("errors")
        if errors or found["wrong"] or found["lost"]:
            failures.append((number, name, mutation, found, *errors))
        for row in (rows[mutation], rows[name], rows["all"]):
            slowest = max(row["slowest (s)"], found["slowest (s)"])
            for column, count in {**found, "shards": 1}.items():
                row[column] += count
            row["slowest (s)"] = slowest
    if pool:
        pool.shutdown()
    return list(rows.values()), failures


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--shards", type=int, default=2000, help="how many are damaged and read")
    add("--only", type=int, help="the number of one shard that is damaged and read")
    add("--seed", type=int, default=0)
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()
    only = options.only
    numbers = range(options.shards) if only is None else [only]
    with tempfile.TemporaryDirectory() as folder:
        rows, failures = run(numbers, options.seed, folder)
    publish(
        f"{options.results}/mutated_shards.json",
        f"{len(numbers)} damaged shards of {SAMPLES} samples, seed {options.seed}",
        rows,
        options=vars(options),
        failures=failures,
    )
    for failure in failures:
        print(*failure, sep="\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
