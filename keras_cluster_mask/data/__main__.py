"""The commands `check` and `convert`: `python -m keras_cluster_mask.data --help`."""

import argparse
import json
import sys
import warnings

from keras_cluster_mask.data import files
from keras_cluster_mask.data.check import check
from keras_cluster_mask.data.convert import convert

# The number of broken samples that are printed.
EXAMPLES = 10


def main(arguments=None):
    """Runs a command.

    Args:
        arguments: list of str. Defaults to `None`: those of the program.

    Returns:
        int. The exit status: 0; 1 if `check` finds a broken sample or `convert` finds
        no intact one; 2 for an error; 130 if the user stops it.
    """
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    # Pillow's warnings are about images that are counted as broken, or harmless.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        return _check(**options) if command == "check" else _convert(**options)
    except (ValueError, OSError, ImportError) as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: stopped", file=sys.stderr)
        return 130


def _parser():
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="tar or TFRecord files, tables, folders, or patterns such as "
        "'train-{00000..00127}.tar'; also at URLs such as s3://",
    )
    both.add_argument(
        "--image-key",
        action="append",
        dest="image_keys",
        metavar="NAME",
        help="the field that holds the image; if repeated, the first that a sample has",
    )
    both.add_argument(
        "--caption-key",
        action="append",
        metavar="NAME",
        help="the field that holds the caption, such as json.caption; may be repeated",
    )

    parser = argparse.ArgumentParser(
        prog="python -m keras_cluster_mask.data",
        description="Check and convert image-text data.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    title = "index shards, count their samples, and list the broken ones"
    add = commands.add_parser(
        "check", parents=[both], help=title, description=title
    ).add_argument
    add(
        "--workers",
        type=int,
        default=0,
        dest="num_workers",
        metavar="N",
        help="processes that index shards; default: none",
    )
    add("--index", dest="index_dir", metavar="DIR", help="default: beside the shards")
    add("--decode", action="store_true", help="read and decode every image, too")
    add("--json", metavar="FILE", help="write the result to this file, too")
    title = "write any readable source as tar shards"
    add = commands.add_parser(
        "convert", parents=[both], help=title, description=title
    ).add_argument
    add("--to", required=True, metavar="DEST", help="'shards/train-{00000}.tar'")
    add("--samples-per-shard", type=int, default=10_000, metavar="N")
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="resize images whose shorter side is longer than N pixels; by default "
        "all bytes are copied",
    )
    return parser


def _check(**options):
    path = options.pop("json")
    result = check(**options)
    if path:
        with files.replacing(path) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    print(f"{result['samples']:>12,}  intact samples")
    _print_broken(result)
    return 1 if result["broken"] else 0


def _convert(**options):
    result = convert(**options)
    shards = result["shards"]
    where = " to ".join(dict.fromkeys([*shards[:1], *shards[-1:]])) or "no file"
    print(f"{result['samples']:>12,}  samples written: {_printable(where)}")
    _print_broken(result)
    return 0 if result["samples"] else 1


def _print_broken(result):
    print(f"{result['broken']:>12,}  broken samples")
    for reason, count in result["by_reason"].items():
        print(f"{count:>12,}  {reason}")
    for sample in result["first_broken"][:EXAMPLES]:
        print("  ", *(_printable(sample[name]) for name in ("shard", "key", "reason")))


def _printable(text):
    """Text, or None, as one line that any terminal can show."""
    text = "-" if text is None else text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


if __name__ == "__main__":
    sys.exit(main())
