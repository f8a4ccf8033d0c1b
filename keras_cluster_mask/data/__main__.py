"""Command-line interface: `python -m keras_cluster_mask.data --help`."""

import argparse
import json
import pathlib
import sys
import warnings

from keras_cluster_mask.data.check import check


def main(arguments=None):
    """Runs the command.

    Args:
        arguments: list of str. Defaults to `None`: those in `sys.argv`.

    Returns:
        int. The exit status: 0, or 1 if a sample is broken. argparse exits with 2 on an
        error.
    """
    parser = argparse.ArgumentParser(prog="python -m keras_cluster_mask.data")
    commands = parser.add_subparsers(dest="command", required=True)
    title = "index shards, count their samples, and list the broken ones"
    command = commands.add_parser("check", help=title, description=title)
    add = command.add_argument
    add("source", nargs="+", help="see `kcm.data.list_shards`")
    add("--image-key", action="append", dest="image_keys", help="may be repeated")
    add("--caption-key", action="append", help="such as json.caption; may be repeated")
    add("--workers", type=int, default=0, dest="num_workers", help="processes")
    add("--index", dest="index_dir", help="folder, or beside; default: ~/.cache")
    add("--decode", action="store_true", help="read and decode every image, too")
    add("--json", help="write the result to this file, too")
    options = vars(parser.parse_args(arguments))
    del options["command"]
    path = options.pop("json")
    # Pillow warns about images that are counted as broken anyway, or are harmless.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        result = check(**options)
    except (ValueError, OSError, ImportError) as error:
        command.error(str(error))
    if path:
        pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['samples']:>12,}  intact samples")
    print(f"{result['broken']:>12,}  broken samples")
    for reason, count in result["by_reason"].items():
        print(f"{count:>12,}  {reason}")
    for sample in result["first_broken"][:10]:
        # Keys may contain control characters.
        print("  ", sample["shard"], ascii(sample["key"]), sample["reason"])
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
