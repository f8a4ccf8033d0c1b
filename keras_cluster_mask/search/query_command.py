"""`query`: finds the pictures of an index by words or by pictures."""

from keras_cluster_mask.data.preparation import arguments
from keras_cluster_mask.data.preparation.faults import printable
from keras_cluster_mask.data.preparation.results import write_figure
from keras_cluster_mask.data.tokenizers import CLIPTokenizer
from keras_cluster_mask.search.result_sheets import result_sheet
from keras_cluster_mask.search.searcher import Searcher

NAME = "query"
HELP = "find pictures by words or by pictures"


def add_arguments(parser):
    """Adds the command's arguments to an `argparse` parser."""
    parser.add_argument("index", metavar="INDEX.npz", help="what `index` wrote")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="words to search by")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", dest="images",
        help="a picture to search by; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="what the index was built with"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="what `CLIPTokenizer.save` wrote, for texts"
    )
    parser.add_argument(
        "-k", type=arguments.positive, default=10, metavar="N",
        help="how many pictures to find for each; default: 10",
    )  # fmt: skip
    parser.add_argument(
        "--sheet", metavar="FILE.png", help="show what was found in one picture"
    )


def run(options):
    """Runs the command, and returns its exit status."""
    if not options.texts and not options.images:
        raise ValueError("give a TEXT or an --image to search by")
    if options.texts and not options.tokenizer:
        raise ValueError("a TEXT needs the --tokenizer that the model was trained with")
    if options.sheet and not options.sheet.lower().endswith(".png"):
        raise ValueError(f"--sheet must end in .png. Received: {options.sheet}")
    tokenizer = options.tokenizer and CLIPTokenizer.from_file(options.tokenizer)
    searcher = Searcher(options.model, options.index, tokenizer)
    results = []
    if options.texts:
        results += searcher.by_text(options.texts, options.k)
    if options.images:
        results += searcher.by_image(options.images, options.k)
    for result in results:
        print(printable(result.query))
        for match in result.matches:
            print(f"{match.similarity:>12.3f}  {printable(match.path or match.key)}")
    if options.sheet:
        write_figure(options.sheet, result_sheet(results))
        print(f"{len(results):>12,}  queries shown: {printable(options.sheet)}")
    return 0
