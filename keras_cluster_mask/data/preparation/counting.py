"""`count`: pairs per shard and in all, without decoding."""

import collections
from concurrent import futures

from keras_cluster_mask.data.decoding import num_processors
from keras_cluster_mask.data.preparation import arguments
from keras_cluster_mask.data.preparation.faults import printable
from keras_cluster_mask.data.preparation.progress import Progress
from keras_cluster_mask.data.preparation.results import write_json
from keras_cluster_mask.data.preparation.samples import Samples

NAME = "count"
HELP = "count pairs per shard and in all, without decoding pictures"


def count(
    source, *, image_keys=None, caption_key=None, num_threads=None, verbose=False
):
    """Counts the pairs of a picture and its captions, without decoding any.

    These are what an epoch of training goes through, unless pictures do not decode. In
    a manifest each row is a pair.

    Example:

    ```python
    print(kcm.data.preparation.count("shards/train-*.tar")["pairs"])
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        image_keys: str or sequence of str; see `image_text_dataset`.
        caption_key: str or sequence of str; see `image_text_dataset`.
        num_threads: int. How many shards are read at a time. Defaults to `None`: the
            number of processors.
        verbose: bool. Whether to show progress on stderr. Defaults to `False`.

    Returns:
        dict: `"pairs"`, `"captions"` and `"broken"`, ints; `"shards"`, a dict from each
        file to a dict of the same.

    Raises:
        FileNotFoundError: if a shard is missing.
    """
    samples = Samples(source, image_keys, caption_key)
    shards = samples.reader.shards
    by_file = {path: collections.Counter() for path in samples.paths}
    num_threads = num_threads or num_processors()
    with (
        futures.ThreadPoolExecutor(num_threads) as threads,
        Progress(NAME, len(shards), verbose) as progress,
    ):
        counts = threads.map(lambda shard: _count(samples.reader, shard), shards)
        for number, (shard, found) in enumerate(zip(shards, counts)):
            by_file[shard.path] += found
            progress(number, found["pairs"])
    names = ("pairs", "captions", "broken")
    return {
        **{name: sum(found[name] for found in by_file.values()) for name in names},
        "shards": {
            path: {name: found[name] for name in names}
            for path, found in by_file.items()
        },
    }


def _count(reader, shard):
    found = collections.Counter()

    def report(shard, key, reason, details):
        found["broken"] += reason is not None

    for pair in reader.read(shard, report):
        found["pairs"] += 1
        found["captions"] += len(pair.captions)
    return found


def add_arguments(parser):
    """Adds the command's arguments to an `argparse` parser."""
    arguments.add_source(parser)
    arguments.add_json(parser, "the counts")


def run(options):
    """Runs the command, and returns its exit status."""
    found = count(options.source, **arguments.read_options(options))
    if options.json:
        write_json(options.json, found)
    print(f"{'pairs':>12}{'captions':>12}{'broken':>12}")
    for path, counts in found["shards"].items():
        _print(counts, printable(path))
    _print(found, "in all")
    return 0


def _print(counts, name):
    numbers = (counts[each] for each in ("pairs", "captions", "broken"))
    print("".join(f"{number:>12,}" for number in numbers) + f"  {name}")
