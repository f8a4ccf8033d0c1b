"""How the data pipeline reads damaged shards.

    python benchmarks/mutated_shards.py --shards 2000 --seed 0

Writes small shards (tar, tar with PAX names, tar.gz, TFRecord, TFRecord.gz) of PNG and
JPEG images, damages a copy of one in each round, and reads it in evaluation and in
training.

A sample is silently wrong if its caption or image is not the one that was written
under its key, although the file still has the header of this caption or image with
all that followed it, and nowhere with anything else; in compressed files and TFRecords,
which have checksums, in any case. A sample is lost if all of its bytes are still there
and it is neither given, nor counted as skipped, nor its shard counted as damaged. A
shard that takes longer than a limit ends the run with a traceback.
"""

import dataclasses
import faulthandler
import gzip
import io
import os
import random
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from PIL import Image
from reporting import parser, publish

from keras_cluster_mask.data import ImageTextBatches

SAMPLES = 12
SIZE = 24
BLOCK = 512
SECONDS = 30
# Its length decides where shards are damaged.
CAPTION = b"picture number %d"  # codespell:ignore picture
COLUMNS = {
    "given": "given",
    "skipped": "skipped",
    "shards damaged": "damaged",
    "shards refused": "refused",
    "hit: changed": "changed",
    "hit: another's": "exchanged",
    "silently wrong": "wrong",
    "lost": "lost",
    "other errors": "errors",
}
# The beginnings of errors that say what is wrong with a shard as a whole.
DOCUMENTED = (
    "`source` holds no readable pair",
    "`source` must hold samples",
    "No image of a batch decodes",
)


@dataclasses.dataclass
class Base:
    """A shard as it was written.

    Attributes:
        name: str. The end of its name, which tells its kind.
        content: bytes.
        spans: list of pairs of int: where each member or record starts and ends.
        samples: dict from a key to the caption, the decoded image, and the members
            that hold them.
        checked: bool. Whether the content has checksums.
    """

    name: str
    content: bytes
    spans: list
    samples: dict
    checked: bool


@dataclasses.dataclass
class Member:
    """A file in a tar, or a record.

    Attributes:
        whole: bytes. The header and the content.
        header: bytes.
    """

    whole: bytes
    header: bytes

    def is_in(self, content):
        return self.whole in content

    def is_intact_in(self, content):
        """Whether its header is there, and each time with its content."""
        times = content.count(self.whole)
        return times > 0 and content.count(self.header) == times


# === Shards ===


def bases(seed):
    """Lists of two shards of each kind; no key or caption is in both."""
    kinds = [("tar", _tar, {}), ("pax.tar", _tar, {"stem": "n" * 120})]
    kinds.append(("tar.gz", _tar, {"compressed": True}))
    try:
        import tensorflow  # noqa: F401

        kinds += [("tfrecord", _records, {})]
        kinds += [("tfrecord.gz", _records, {"compressed": True})]
    except ImportError:
        print("TFRecord files are left out: there is no tensorflow.")
    for name, write, options in kinds:
        yield [write(name, _pairs(seed, half), **options) for half in range(2)]


def _pairs(seed, half):
    """Keys, endings, captions and images: noise about a colour of its own."""
    rng = np.random.default_rng([seed, half])
    for index in range(half * SAMPLES, half * SAMPLES + SAMPLES):
        levels = 40 + 80 * np.array([index % 3, index // 3 % 3, index // 9])
        image = levels + rng.integers(-8, 9, (SIZE, SIZE, 3))
        ending, format = (("png", "PNG"), ("jpg", "JPEG"))[index % 2]
        file = io.BytesIO()
        Image.fromarray(image.astype("uint8")).save(file, format)
        yield f"{index:04}", ending, CAPTION % index, file.getvalue()


def _decoded(image):
    return np.array(Image.open(io.BytesIO(image)).convert("RGB"))


def _tar(name, pairs, stem="", compressed=False):
    file = io.BytesIO()
    images, members, spans = {}, {}, []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, ending, caption, image in pairs:
            key = stem + key
            images[key] = caption.decode(), _decoded(image)
            for end, content in ((ending, image), ("txt", caption)):
                member = tarfile.TarInfo(f"{key}.{end}")
                member.size = len(content)
                start = archive.offset
                archive.addfile(member, io.BytesIO(content))
                spans.append((start, archive.offset))
                whole = file.getvalue()[start : archive.offset]
                header = whole[: -(-(-len(content) // BLOCK) * BLOCK)]
                members[key, end == "txt"] = Member(whole, header)
    content = file.getvalue()
    samples = {
        key: (*found, members[key, True], members[key, False])
        for key, found in images.items()
    }
    if compressed:
        content = gzip.compress(content, mtime=0)
        spans = _blocks(content)
    return Base(name, content, spans, samples, compressed)


def _records(name, pairs, compressed=False):
    import tensorflow as tf

    def feature(value):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    samples, spans, start = {}, [], 0
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/records"
        with tf.io.TFRecordWriter(path) as writer:
            for key, _, caption, image in pairs:
                values = {"__key__": key.encode(), "txt": caption, "image": image}
                features = {name: feature(value) for name, value in values.items()}
                features = tf.train.Features(feature=features)
                record = tf.train.Example(features=features).SerializeToString()
                writer.write(record)
                # A record's length, and the checksums of this and of the content.
                spans.append((start, start + len(record) + 16))
                start = spans[-1][1]
                member = Member(record, record[:12])
                samples[key] = caption.decode(), _decoded(image), member, member
        content = Path(path).read_bytes()
    if compressed:
        content = gzip.compress(content, mtime=0)
        spans = _blocks(content)
    return Base(name, content, spans, samples, True)


def _blocks(content):
    starts = range(0, len(content), BLOCK)
    return [(start, min(start + BLOCK, len(content))) for start in starts]


# === Damage ===


def one_bit(rng, base, other):
    return _flipped(rng, base.content, 1)


def several_bits(rng, base, other):
    return _flipped(rng, base.content, rng.randint(2, 16))


def cut(rng, base, other):
    return base.content[: rng.randrange(len(base.content))]


def swapped_blocks(rng, base, other):
    return _swapped(rng, base.content, _blocks(base.content))


def swapped_members(rng, base, other):
    return _swapped(rng, base.content, base.spans)


def repeated_blocks(rng, base, other):
    start, end = rng.choice(rng.choice([base.spans, _blocks(base.content)]))
    place = rng.choice(_blocks(base.content))[0]
    return base.content[:place] + base.content[start:end] + base.content[place:]


def zeroed_blocks(rng, base, other):
    start, end = rng.choice(_blocks(base.content))
    end = min(end + BLOCK * rng.randrange(4), len(base.content))
    return base.content[:start] + bytes(end - start) + base.content[end:]


def inserted_garbage(rng, base, other):
    place = rng.randrange(len(base.content))
    garbage = rng.randbytes(rng.choice([1, BLOCK, rng.randint(1, 3 * BLOCK)]))
    return base.content[:place] + garbage + base.content[place:]


def exchanged_endings(rng, base, other):
    # Something of the first must be left.
    size = len(base.content)
    place = rng.choice([rng.choice(base.spans[1:])[0], rng.randrange(1, size)])
    start = rng.choice([place, rng.choice(other.spans)[0]])
    return base.content[:place] + other.content[start:]


MUTATIONS = (
    *(one_bit, several_bits, cut, swapped_blocks, swapped_members, repeated_blocks),
    *(zeroed_blocks, inserted_garbage, exchanged_endings),
)


def _flipped(rng, content, count):
    content = bytearray(content)
    for _ in range(count):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _swapped(rng, content, spans):
    (a, b), (c, d) = sorted(rng.sample(spans, 2))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


# === Reading and judging ===


def read(path, training):
    """Reads a shard as models do.

    Returns:
        tuple: the samples as a list of key, caption and image; `SkippedSamples` or
        None; the error (str) or None, and whether it is one of the documented.
    """
    batches = None
    given = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = ImageTextBatches(
                path,
                lambda captions: [[0]] * len(captions),
                SIZE,
                4,
                training,
                seed=0,
                max_skipped=1,
                drop_remainder=False,
                include_captions=True,
                include_keys=True,
                num_threads=1,
            )
            for batch in batches:
                keys = [key.decode("utf-8", "replace") for key in batch["keys"]]
                given += zip(keys, batch["captions"], batch["images"])
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        documented = isinstance(error, ValueError) and str(error).startswith(DOCUMENTED)
        return given, batches and batches.skipped, message, documented
    return given, batches.skipped, None, True


def judge(base, other, content, path):
    """Reads damaged content in both ways; returns what is to be counted, a dict."""
    path.write_bytes(content)
    samples = {**base.samples, **other.samples}
    found = dict.fromkeys(
        (
            *("refused", "damaged", "given", "skipped"),
            *("changed", "exchanged", "wrong", "lost"),
        ),
        0,
    )
    found["errors"] = []
    passes = []
    for training in (False, True):
        given, skipped, error, documented = read(path, training)
        if not documented:
            found["errors"].append(error)
        for key, caption, image in given:
            verdict = _verdict(base, samples, content, key, caption, image, training)
            if verdict:
                found[verdict] += 1
        if error:
            found["refused"] += not training
            continue
        reasons = dict(skipped.by_reason)
        passes.append((len({key for key, *_ in given}), reasons))
        damaged = "damaged shard" in reasons
        known = {key for key, *_ in given} | {key for _, key, _ in skipped.samples}
        if not damaged:
            found["lost"] += sum(
                key not in known
                for key, (_, _, caption, image) in base.samples.items()
                if base.name.endswith("gz")
                or (caption.is_in(content) and image.is_in(content))
            )
        if not training:
            found["damaged"] += damaged
            found["given"] += len(given)
            found["skipped"] += skipped.count
    if len(passes) == 2 and passes[0] != passes[1]:
        found["errors"].append(f"the passes differ: {passes}")
    return found


def _verdict(base, samples, content, key, caption, image, training):
    """What a sample is: None if right, else `"wrong"`, or if it was hit `"changed"`.

    `"exchanged"`, if what it has instead is another sample's.
    """
    if key not in samples:
        return "wrong"
    its_caption, its_image, caption_member, image_member = samples[key]
    right = caption.decode("utf-8", "replace") == its_caption
    if not right and (base.checked or caption_member.is_intact_in(content)):
        return "wrong"
    same = _same(image, its_image, training)
    if not same and (base.checked or image_member.is_intact_in(content)):
        return "wrong"
    if right and same:
        return None
    text = caption.decode("utf-8", "replace")
    exchanged = (not right and text in [each[0] for each in samples.values()]) or (
        not same and any(_same(image, each[1], training) for each in samples.values())
    )
    return "exchanged" if exchanged else "changed"


def _same(image, other, training):
    if not training:
        return np.array_equal(image, other)
    # A part of it, so that only its colour can be compared.
    return np.abs(image.mean((0, 1)) - other.mean((0, 1))).max() < 10


def run(shards, seed, folder, progress=lambda done: None):
    """Damages and reads so many shards.

    Returns:
        tuple: rows of a table, and a list of what must not be, with the number of the
        shard, its kind and the mutation.
    """
    rows, failures = {}, []
    kinds = list(bases(seed))
    for number in range(shards):
        mutate = MUTATIONS[number % len(MUTATIONS)]
        base, other = kinds[number // len(MUTATIONS) % len(kinds)]
        rng = random.Random(f"{seed} {number}")
        content = mutate(rng, base, other)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        start = time.perf_counter()
        found = judge(base, other, content, Path(folder) / f"{number}.{base.name}")
        seconds = time.perf_counter() - start
        faulthandler.cancel_dump_traceback_later()
        (Path(folder) / f"{number}.{base.name}").unlink()
        if found["errors"] or found["wrong"] or found["lost"]:
            failures.append((number, base.name, mutate.__name__, found))
        for name in (mutate.__name__.replace("_", " "), "all"):
            row = rows.setdefault(name, {"mutation": name, "shards": 0})
            row["shards"] += 1
            counts = {**found, "errors": len(found["errors"])}
            for label, count in COLUMNS.items():
                row[label] = row.get(label, 0) + counts[count]
            row["slowest (s)"] = max(row.get("slowest (s)", 0), round(seconds, 2))
        progress(number + 1)
    rows["all"] = rows.pop("all")
    return list(rows.values()), failures


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--shards", type=int, default=2000, help="how many are damaged and read")
    add("--seed", type=int, default=0)
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    def progress(done):
        if done % 100 == 0:
            print(f"{done} of {options.shards} shards", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        rows, failures = run(options.shards, options.seed, folder, progress)
    publish(
        f"{options.results}/mutated_shards.json",
        f"{options.shards} damaged shards of {SAMPLES} samples, seed {options.seed}",
        rows,
        options=vars(options),
        failures=failures,
    )
    for failure in failures:
        print(*failure)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
