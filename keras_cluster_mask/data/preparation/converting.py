"""`convert`: folders, tar shards and TFRecord shards into one another."""

from keras_cluster_mask.data.preparation import arguments
from keras_cluster_mask.data.preparation.destinations import find_destination
from keras_cluster_mask.data.preparation.faults import print_faults, printable
from keras_cluster_mask.data.preparation.results import write_json
from keras_cluster_mask.data.preparation.samples import Samples
from keras_cluster_mask.data.preparation.writing import encoder, write

NAME = "convert"
HELP = "write samples as tar shards, TFRecord shards or a folder with a manifest"


def convert(
    source,
    to,
    *,
    samples_per_shard=10_000,
    image_size=None,
    verify=True,
    image_keys=None,
    caption_key=None,
    overwrite=False,
    num_threads=None,
    verbose=False,
):
    """Writes samples as tar shards, TFRecord shards or a folder with a manifest.

    Samples keep their order, all their captions, and their keys, as far as the
    destination can hold them; a key that comes again gets a number. What is broken is
    left out. Pictures are named by what they are, whatever they were called.

    Each shard is there only once it is whole. A run that was cut off goes on when it is
    started again with the same arguments; how far it was is in `TO.state.json`. Sources
    that have changed since, by their size and date, are refused; the pictures that a
    manifest names are not looked at for this.

    Example:

    ```python
    kcm.data.preparation.convert("photos/metadata.csv", "shards/train-{00000}.tar")
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        to: str or path. What to write, by its end: `shards/train-{00000}.tar` or
            `shards/train-{00000}.tfrecord`, shards that are numbered as the zeros say,
            or one shard without them; or `folder/metadata.csv`, `.tsv` or `.jsonl`, a
            manifest and pictures in folders beside it. May be an address. Several
            captions are rows of their own in CSV and TSV, a list in JSON lines and
            TFRecords, and the list `captions` of `KEY.json` in tars.
        samples_per_shard: int. Defaults to `10000`. A folder holds so many pictures.
        image_size: int. Pictures with a longer shorter side are shrunk to this, turned
            upright, and written as JPEG of quality 95, or as PNG if they are
            transparent. Defaults to `None`: all bytes are copied as they are.
        verify: bool. Whether pictures that are only copied are decoded all the same, to
            leave out what is broken. Defaults to `True`.
        image_keys: str or sequence of str; see `image_text_dataset`.
        caption_key: str or sequence of str; see `image_text_dataset`.
        overwrite: bool. Whether to begin anew and to replace what is there. Defaults to
            `False`.
        num_threads: int. How many pictures are decoded at a time. Defaults to `None`:
            the number of processors.
        verbose: bool. Whether to show progress on stderr. Defaults to `False`.

    Returns:
        dict: `"samples"`, how many were written; `"shards"`, the files to be read;
        `"broken"`, how many were left out; `"by_reason"`, a dict of counts;
        `"first_broken"`, at most 100 lists of shard, key and reason.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if an argument does not make sense, if `to` is there already, or if
            a run with other arguments has begun to write it.
        ImportError: if TFRecord files are asked for and TensorFlow is not installed.
    """
    destination = find_destination(to)
    options = {"image_size": image_size, "verify": verify}
    return write(
        NAME,
        Samples(source, image_keys, caption_key),
        destination,
        encoder(image_size, verify),
        options,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
        num_threads=num_threads,
        verbose=verbose,
    )


def add_arguments(parser):
    """Adds the command's arguments to an `argparse` parser."""
    arguments.add_source(parser)
    parser.add_argument(
        "--to",
        required=True,
        metavar="DEST",
        help="'shards/train-{00000}.tar', 'shards/train-{00000}.tfrecord', or "
        "'folder/metadata.csv' (.tsv, .jsonl)",
    )
    arguments.add_destination(parser)
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="copy pictures without decoding them, broken ones too",
    )
    arguments.add_json(parser, "what was written and left out")


def run(options):
    """Runs the command, and returns its exit status."""
    written = convert(
        options.source,
        options.to,
        verify=not options.no_verify,
        **arguments.write_options(options),
        **arguments.read_options(options),
    )
    if options.json:
        write_json(options.json, written)
    print_written(written)
    return 0 if written["samples"] else 1


def print_written(written):
    """Prints what was written, and what was left out."""
    shards = [printable(path) for path in written["shards"]]
    where = " to ".join(dict.fromkeys([*shards[:1], *shards[-1:]])) or "no file"
    print(f"{written['samples']:>12,}  samples written: {where}")
    if written["broken"]:
        print(f"{written['broken']:>12,}  broken, left out")
        print_faults(written)
