"""`contact-sheet`: samples with their captions as one picture."""

import itertools
import random

from keras_cluster_mask.data.decoding import read_image
from keras_cluster_mask.data.pictures import UnreadablePicture
from keras_cluster_mask.data.preparation import arguments
from keras_cluster_mask.data.preparation.faults import printable
from keras_cluster_mask.data.preparation.progress import Progress
from keras_cluster_mask.data.preparation.results import write_figure
from keras_cluster_mask.data.preparation.samples import Fault, Samples
from keras_cluster_mask.data.preparation.sheets import Cell, draw_sheet

NAME = "contact-sheet"
HELP = "show samples with their captions in one picture"


def contact_sheet(
    source,
    to,
    *,
    rows=5,
    columns=6,
    seed=None,
    image_keys=None,
    caption_key=None,
    verbose=False,
):
    """Shows samples with their captions in one picture.

    A picture that does not decode is shown as a grey field that says so. Captions are
    written in DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic and others,
    but boxes for Chinese, Japanese and Korean.

    Example:

    ```python
    kcm.data.preparation.contact_sheet("shards/train-*.tar", "sheet.png", seed=0)
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        to: str or path. The PNG file to write.
        rows: int. Defaults to `5`.
        columns: int. Defaults to `6`.
        seed: int. Draws samples from all, each as likely as the others, for which all
            shards are read. Defaults to `None`: the first samples.
        image_keys: str or sequence of str; see `image_text_dataset`.
        caption_key: str or sequence of str; see `image_text_dataset`.
        verbose: bool. Whether to show progress on stderr. Defaults to `False`.

    Returns:
        int. How many samples are shown.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if there is no sample, or an argument does not make sense.
    """
    if not str(to).lower().endswith(".png"):
        raise ValueError(f"`to` must end in .png. Received: {to}")
    samples = Samples(source, image_keys, caption_key)
    with Progress(NAME, len(samples), verbose) as progress:
        pairs = _pairs(samples, progress)
        if seed is None:
            chosen = list(itertools.islice(pairs, rows * columns))
        else:
            chosen = _drawn(pairs, rows * columns, random.Random(seed))
    if not chosen:
        raise ValueError(
            "`source` must hold a sample with an image and a caption. Received: "
            f"{samples.paths[0]}"
            + (f" and {len(samples.paths) - 1} more" if samples.paths[1:] else "")
        )
    cells = [cell_of(pair) for pair in chosen]
    shown = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    write_figure(to, draw_sheet(shown))
    return len(cells)


def cell_of(pair, label=""):
    """A sample as it is shown.

    Args:
        pair: `Pair`.
        label: str.

    Returns:
        A `Cell`.
    """
    more = f" (and {len(pair.captions) - 1} more)" if pair.captions[1:] else ""
    try:
        content = read_image(pair.image)
    except UnreadablePicture as error:
        content = str(error)
    return Cell(content, pair.captions[0] + more, label)


def _pairs(samples, progress):
    for item, (shard, _) in samples.read():
        progress(shard)
        if not isinstance(item, Fault):
            yield item


def _drawn(pairs, count, generator):
    """`count` of all pairs, in their order (Vitter's algorithm R, 1985)."""
    drawn = []
    for number, pair in enumerate(pairs):
        if len(drawn) < count:
            drawn.append((number, pair))
        elif (place := generator.randrange(number + 1)) < count:
            drawn[place] = number, pair
    return [pair for _, pair in sorted(drawn, key=lambda each: each[0])]


def add_arguments(parser):
    """Adds the command's arguments to an `argparse` parser."""
    arguments.add_source(parser, threads=False)
    parser.add_argument(
        "--to", required=True, metavar="FILE.png", help="the picture to write"
    )
    parser.add_argument(
        "--rows", type=arguments.positive, default=5, metavar="N", help="default: 5"
    )
    parser.add_argument(
        "--columns", type=arguments.positive, default=6, metavar="N", help="default: 6"
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="draw samples from all; by default the first are shown",
    )


def run(options):
    """Runs the command, and returns its exit status."""
    shown = contact_sheet(
        options.source,
        options.to,
        rows=options.rows,
        columns=options.columns,
        seed=options.seed,
        image_keys=options.image_keys,
        caption_key=options.caption_key,
        verbose=not options.quiet,
    )
    print(f"{shown:>12,}  samples shown: {printable(options.to)}")
    return 0
