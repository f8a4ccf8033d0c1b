"""`deduplicate`: leaves out pictures that came before, or look like one that did."""

import hashlib
import os

import numpy as np

from keras_cluster_mask.data import files
from keras_cluster_mask.data.decoding import read_image
from keras_cluster_mask.data.pictures import Picture
from keras_cluster_mask.data.preparation import arguments
from keras_cluster_mask.data.preparation.contact_sheets import cell_of
from keras_cluster_mask.data.preparation.converting import print_written
from keras_cluster_mask.data.preparation.destinations import find_destination
from keras_cluster_mask.data.preparation.duplicates import DuplicateTable
from keras_cluster_mask.data.preparation.faults import printable
from keras_cluster_mask.data.preparation.likeness import likeness
from keras_cluster_mask.data.preparation.results import write_figure, write_json
from keras_cluster_mask.data.preparation.samples import Samples
from keras_cluster_mask.data.preparation.sheets import Cell, draw_sheet
from keras_cluster_mask.data.preparation.survey import survey
from keras_cluster_mask.data.preparation.writing import encoder, write

NAME = "deduplicate"
HELP = "leave out pictures that came before, or look like one that did"

DISTANCE = 6
MAX_DISTANCE = 15
# What a sheet shows.
SHEET_GROUPS, SHEET_COLUMNS = 20, 6


def deduplicate(
    source,
    to=None,
    *,
    near=False,
    distance=DISTANCE,
    captions=False,
    sheet=None,
    samples_per_shard=10_000,
    image_size=None,
    image_keys=None,
    caption_key=None,
    resume=None,
    overwrite=False,
    num_threads=None,
    verbose=False,
):
    """Keeps the first of equal pictures, and writes what is kept as `convert` does.

    Equal are pictures whose files are the same byte by byte; with `near` also those
    that look alike, such as a copy that was made smaller, compressed or brightened a
    little. A picture is left out if it looks like an earlier one that is kept, so a
    chain of small changes does not take all with it. Cut, mirrored and turned copies
    are not found. Drawings of few shapes, such as icons, may look alike and yet mean
    different things: look at the groups before.

    Example:

    ```python
    found = kcm.data.preparation.deduplicate(
        "shards/train-*.tar", "unique/train-{00000}.tar", near=True
    )
    print(found["duplicates"], found["groups"][:3])
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        to: str or path; see `convert`. Defaults to `None`: writes nothing.
        near: bool. Whether to leave out what looks alike. Defaults to `False`.
        distance: int. How many of 64 bits may differ of what looks alike, up to 15.
            Defaults to `6`.
        captions: bool. Whether only pictures with the same captions are duplicates.
            Defaults to `False`: captions of what is left out are lost.
        sheet: str or path. A PNG file that shows the first groups. Defaults to `None`.
        samples_per_shard: int; see `convert`.
        image_size: int; see `convert`.
        image_keys: str or sequence of str; see `image_text_dataset`.
        caption_key: str or sequence of str; see `image_text_dataset`.
        resume: str or path. A file that keeps the hashes: when started again, the
            command goes on from there. Defaults to `None`: `TO.hashes.jsonl`, unless
            `to` is an address.
        overwrite: bool; see `convert`.
        num_threads: int. How many pictures are decoded at a time. Defaults to `None`:
            the number of processors.
        verbose: bool. Whether to show progress on stderr. Defaults to `False`.

    Returns:
        dict: `"kept"`, `"duplicates"` and `"broken"`, ints; `"groups"`, a list of dicts
        of `"kept"`, a sample, and `"left_out"`, a list of them, each with `"shard"` and
        `"key"`, and with `"bits"`, by how many of 64 it differs, or None where the
        bytes are the same; and `"written"`, what `convert` returns, or None.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if an argument does not make sense, if `to` is there already, or if
            a run with other arguments has begun to write it.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(
            f"`distance` must be from 0 to {MAX_DISTANCE}. Received: {distance}"
        )
    if sheet is not None and not str(sheet).lower().endswith(".png"):
        raise ValueError(f"`sheet` must end in .png. Received: {sheet}")
    destination = None if to is None else find_destination(to)
    samples = Samples(source, image_keys, caption_key)
    findings = survey(
        NAME,
        samples,
        _look,
        {},
        _journal(destination, resume, overwrite),
        num_threads,
        verbose,
    )
    table = DuplicateTable(findings)
    leaders = table.leaders(distance if near else None, captions)
    groups = table.groups(leaders)
    if sheet is not None:
        write_figure(sheet, _draw(samples, groups, table))
    written = None
    kept = set(np.flatnonzero(leaders == np.arange(len(leaders))).tolist())
    if destination is not None:
        written = write(
            NAME,
            samples,
            destination,
            encoder(image_size, verify=False),
            {
                "image_size": image_size,
                "near": near,
                "distance": distance if near else None,
                "captions": captions,
            },
            kept=kept,
            samples_per_shard=samples_per_shard,
            overwrite=overwrite,
            num_threads=num_threads,
            verbose=verbose,
        )
    return {
        "kept": len(kept),
        "duplicates": sum(len(members) for members in groups.values()),
        "broken": table.broken,
        "groups": [
            {
                "kept": table.name(leader),
                "left_out": [
                    {**table.name(member), "bits": table.bits(leader, member)}
                    for member in members
                ],
            }
            for leader, members in groups.items()
        ],
        "written": written,
    }


def _journal(destination, resume, overwrite):
    if resume is not None or destination is None or files.is_address(destination.to):
        return resume
    path = destination.to + ".hashes.jsonl"
    if overwrite and os.path.exists(path):
        os.remove(path)
    return path


def _look(pair):
    content = read_image(pair.image)
    code, colours = likeness(Picture(content))
    captions = "\0".join(pair.captions).encode("utf-8", "surrogatepass")
    return {
        "bytes": hashlib.blake2b(content, digest_size=16).hexdigest(),
        "hash": code and code.hex(),
        "colours": colours.hex(),
        "captions": hashlib.blake2b(captions, digest_size=8).hexdigest(),
    }


def _draw(samples, groups, table):
    """The first groups as a sheet, a row each: what is kept, then what is not."""
    shown = {
        leader: [leader, *members][:SHEET_COLUMNS]
        for leader, members in list(groups.items())[:SHEET_GROUPS]
    }
    labels = {}
    for leader, members in shown.items():
        labels[leader] = f"kept, {len(groups[leader])} left out"
        for member in members[1:]:
            bits = table.bits(leader, member)
            labels[member] = "same bytes" if bits is None else f"{bits} bits differ"
    cells = {}
    for number, (item, _) in enumerate(samples.read()):
        if number in labels:
            cells[number] = cell_of(item, labels[number])
        if len(cells) == len(labels):
            break
    rows = [[cells[number] for number in members] for members in shown.values()]
    return draw_sheet(rows or [[Cell("no duplicates", "")]], max_lines=2)


def add_arguments(parser):
    """Adds the command's arguments to an `argparse` parser."""
    arguments.add_source(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", metavar="DEST", help="as for convert")
    what.add_argument(
        "--dry-run", action="store_true", help="say what would be left out"
    )
    parser.add_argument(
        "--near", action="store_true", help="leave out what looks alike, too"
    )
    parser.add_argument(
        "--distance",
        type=int,
        default=DISTANCE,
        metavar="D",
        help=f"how many of 64 bits may differ, up to {MAX_DISTANCE}; default: "
        f"{DISTANCE}",
    )
    parser.add_argument(
        "--captions",
        action="store_true",
        help="only where the captions are the same, too",
    )
    parser.add_argument(
        "--sheet", metavar="FILE.png", help="show the first groups in a picture"
    )
    arguments.add_destination(parser)
    arguments.add_resume(parser)
    arguments.add_json(parser, "the groups")


def run(options):
    """Runs the command, and returns its exit status."""
    found = deduplicate(
        options.source,
        options.to,
        near=options.near,
        distance=options.distance,
        captions=options.captions,
        sheet=options.sheet,
        resume=options.resume,
        **arguments.write_options(options),
        **arguments.read_options(options),
    )
    if options.json:
        write_json(options.json, found)
    print(f"{found['kept']:>12,}  different pictures")
    print(f"{found['duplicates']:>12,}  duplicates, in {len(found['groups']):,} groups")
    if options.dry_run:
        _print_groups(found["groups"])
    if found["written"]:
        print_written(found["written"])
    elif found["broken"]:
        print(f"{found['broken']:>12,}  broken")
    return 0 if found["kept"] else 1


def _print_groups(groups):
    for group in groups:
        print(_name(group["kept"]))
        for member in group["left_out"]:
            bits = member["bits"]
            what = "same bytes" if bits is None else f"{bits} bits differ"
            print(f"    {_name(member)}  {what}")


def _name(sample):
    return f"{printable(sample['shard'])}  {printable(sample['key'])}"
