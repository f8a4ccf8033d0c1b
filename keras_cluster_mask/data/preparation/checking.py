"""`check`: reads every sample, and decodes every picture whole."""

import dataclasses

from keras_cluster_mask.data.decoding import read_image
from keras_cluster_mask.data.preparation import arguments
from keras_cluster_mask.data.preparation.faults import FaultCount, print_faults
from keras_cluster_mask.data.preparation.results import write_json
from keras_cluster_mask.data.preparation.samples import Fault, Samples, decode
from keras_cluster_mask.data.preparation.survey import survey

NAME = "check"
HELP = "read every sample, decode every picture, and say what is broken"


def check(
    source,
    *,
    image_keys=None,
    caption_key=None,
    resume=None,
    num_threads=None,
    verbose=False,
):
    """Reads every sample, and decodes every picture whole.

    Example:

    ```python
    found = kcm.data.preparation.check("shards/train-*.tar")
    print(found["samples"], found["broken"], found["by_reason"])
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        image_keys: str or sequence of str; see `image_text_dataset`.
        caption_key: str or sequence of str; see `image_text_dataset`.
        resume: str or path. A file that keeps what was found: when started again with
            it, the check goes on from there. Defaults to `None`: none.
        num_threads: int. How many pictures are decoded at a time. Defaults to `None`:
            the number of processors.
        verbose: bool. Whether to show progress on stderr. Defaults to `False`.

    Returns:
        dict: `"samples"`, how many are whole; `"broken"`, how many are not;
        `"by_reason"`, a dict of counts; `"first_broken"`, at most 100 lists of shard,
        key and reason; and `"all_broken"`, a list of dicts of `"shard"`, `"key"`,
        `"reason"` and `"details"`. A damaged shard counts as one, since nobody can tell
        what its rest held. A key that a sample of an earlier shard has already counts
        as broken, except in manifests. Rows of a manifest that follow one another and
        name the same picture are one sample.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if an argument does not make sense, or `resume` is about something
            else.
    """
    samples = Samples(source, image_keys, caption_key)
    repeatable = {str(s) for s in samples.reader.shards if not s.unique_keys}
    faults, broken, shards, good = FaultCount(), [], {}, 0
    for found in survey(NAME, samples, _look, {}, resume, num_threads, verbose):
        fault = _fault(found, shards, repeatable)
        if fault is None:
            good += 1
            continue
        faults.add(fault.shard, fault.key, fault.reason)
        broken.append(dataclasses.asdict(fault))
    return {"samples": good, **faults.summary(), "all_broken": broken}


def _look(pair):
    decode(read_image(pair.image))
    return {}


def _fault(found, shards, repeatable):
    """What is wrong with a sample; `shards` holds where each key was first."""
    shard, key = found["shard"], found["key"]
    if "reason" in found:
        return Fault(**found)
    first = shard if shard in repeatable else shards.setdefault(key, shard)
    if first == shard:
        return None
    return Fault(shard, key, "duplicate key across shards", f"It is in {first} too")


def add_arguments(parser):
    """Adds the command's arguments to an `argparse` parser."""
    arguments.add_source(parser)
    arguments.add_resume(parser)
    arguments.add_json(parser, "the list of all that is broken")


def run(options):
    """Runs the command, and returns its exit status."""
    found = check(
        options.source, resume=options.resume, **arguments.read_options(options)
    )
    if options.json:
        write_json(options.json, found)
    print(f"{found['samples']:>12,}  whole samples")
    print(f"{found['broken']:>12,}  broken")
    print_faults(found)
    return 1 if found["broken"] else 0
