"""`index`: embeds pictures, to be searched."""

from keras_cluster_mask.data.preparation import arguments
from keras_cluster_mask.data.preparation.faults import printable
from keras_cluster_mask.search.image_index import ImageIndex
from keras_cluster_mask.search.index_file import check_place

NAME = "index"
HELP = "embed pictures, to be searched"


def add_arguments(parser):
    """Adds the command's arguments to an `argparse` parser."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a .keras file, or the folder of a preset",
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="folders of pictures, picture files, shards, manifests, or patterns",
    )
    parser.add_argument(
        "--to", required=True, metavar="FILE.npz", help="the index to write"
    )
    parser.add_argument(
        "--batch-size", type=arguments.positive, default=64, metavar="N",
        help="default: 64",
    )  # fmt: skip
    parser.add_argument(
        "--float16", action="store_true", help="half the size, three digits"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(options):
    """Runs the command, and returns its exit status."""
    # Before hours of embedding.
    check_place(options.to)
    index = ImageIndex.build(
        options.model,
        options.source,
        batch_size=options.batch_size,
        verbose=not options.quiet,
    )
    index.save(options.to, "float16" if options.float16 else "float32")
    print(f"{len(index):>12,}  pictures indexed: {printable(options.to)}")
    if index.num_skipped:
        print(f"{index.num_skipped:>12,}  could not be read, left out")
    return 0
