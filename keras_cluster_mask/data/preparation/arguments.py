"""Arguments that the commands share."""


def add_source(parser, threads=True):
    """Adds what is read, and how.

    Args:
        parser: `argparse.ArgumentParser`.
        threads: bool. Whether the command has threads.
    """
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="tar or TFRecord files, manifests, folders with a manifest, or patterns "
        "such as 'train-{00000..00127}.tar'; also at addresses such as s3://",
    )
    parser.add_argument(
        "--image-keys",
        type=names,
        metavar="NAMES",
        help="the field that holds the picture; several with commas between: the first "
        "that a sample has",
    )
    parser.add_argument(
        "--caption-key",
        type=names,
        metavar="NAMES",
        help="the field that holds the caption, such as json.caption; several likewise",
    )
    if threads:
        parser.add_argument(
            "--threads", type=positive, metavar="N", help="how many work at a time"
        )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress on standard error"
    )


def add_resume(parser):
    """Adds the file from which a cut-off run goes on."""
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="keep here what was found, and go on from it when started again",
    )


def add_json(parser, what):
    """Adds the file of results."""
    parser.add_argument("--json", metavar="FILE", help=f"write {what} as JSON")


def add_destination(parser):
    """Adds what is written, and how."""
    parser.add_argument(
        "--samples-per-shard", type=positive, default=10_000, metavar="N",
        help="default: 10000",
    )  # fmt: skip
    parser.add_argument(
        "--image-size",
        type=positive,
        metavar="N",
        help="shrink the shorter side to N pixels where it is longer, as JPEG of "
        "quality 95, or PNG if transparent; by default bytes are copied",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew, and replace what is there",
    )


def read_options(options):
    """The keyword arguments of a command's function that `add_source` added."""
    return {
        "image_keys": options.image_keys,
        "caption_key": options.caption_key,
        "num_threads": options.threads,
        "verbose": not options.quiet,
    }


def write_options(options):
    """The keyword arguments of a command's function that `add_destination` added."""
    return {
        "samples_per_shard": options.samples_per_shard,
        "image_size": options.image_size,
        "overwrite": options.overwrite,
    }


def names(text):
    """A list of the names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def positive(text):
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


# argparse says "invalid NAME value".
positive.__name__ = "positive int"
