"""Command-line interface: `python -m keras_cluster_mask.data --help`."""

import argparse
import json
import sys

from keras_cluster_mask.data.check import check


def main(arguments=None):
    """Runs the command, and prints the result as JSON.

    Args:
        arguments: List of strings. Defaults to `None`: those in `sys.argv`.

    Returns:
        Integer. The exit status: 0, or 1 if a sample is broken. argparse exits with 2
        on an error.
    """
    parser = argparse.ArgumentParser(prog="python -m keras_cluster_mask.data")
    add = parser.add_argument
    add("command", choices=["check"], help="count samples, and list the broken ones")
    add("source", nargs="+", help="see `kcm.data.list_shards`")
    add("--image-key", action="append", dest="image_keys", help="may be repeated")
    add("--caption-key", action="append", help="such as json.caption; may be repeated")
    add("--label-key", action="append", help="such as folder: no captions needed")
    names = "such as cat, if labels are names; repeated for each class"
    add("--class-name", action="append", dest="class_names", help=names)
    add("--workers", type=int, default=0, dest="num_workers", help="processes")
    add("--index", dest="index_dir", help="folder, or beside; default: ~/.cache")
    add("--decode", action="store_true", help="read and decode every image, too")
    options = vars(parser.parse_args(arguments))
    del options["command"]
    try:
        result = check(**options)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(json.dumps(result, indent=1))
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
