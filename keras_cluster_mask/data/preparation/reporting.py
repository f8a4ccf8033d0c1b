"""`report`: sizes, kinds of files, lengths of captions, and what is broken."""

import collections
import hashlib
import os

import numpy as np

from keras_cluster_mask.data.decoding import read_image
from keras_cluster_mask.data.pictures import Picture
from keras_cluster_mask.data.preparation import arguments
from keras_cluster_mask.data.preparation.faults import (
    FaultCount,
    print_faults,
    printable,
)
from keras_cluster_mask.data.preparation.figures import draw_report
from keras_cluster_mask.data.preparation.results import write_figure, write_json
from keras_cluster_mask.data.preparation.samples import Samples, decode
from keras_cluster_mask.data.preparation.survey import survey
from keras_cluster_mask.data.tokenizers import CLIPTokenizer

NAME = "report"
HELP = "describe sizes, kinds of files and captions, and what is broken"

# What CLIP reads of a caption, with the marks of its start and end.
CONTEXT = 77
# Longer ones count as so long.
MAX_TOKENS = 1024
QUANTILES = {
    **{"min": 0, "1%": 0.01, "5%": 0.05, "25%": 0.25, "50%": 0.5},
    **{"75%": 0.75, "95%": 0.95, "99%": 0.99, "max": 1},
}
# How many captions are named, and how much of each.
TOP, START = 20, 100

# The numbers that are kept of each picture, and of each caption.
OF_PICTURES = ("width", "height", "bytes")
OF_CAPTIONS = ("characters", "words", "tokens")


def report(
    source,
    to=None,
    *,
    tokens=False,
    image_keys=None,
    caption_key=None,
    resume=None,
    num_threads=None,
    verbose=False,
):
    """Describes pictures and captions; decodes all, to say what is broken.

    Example:

    ```python
    found = kcm.data.preparation.report("shards/train-*.tar", "report")
    print(found["pictures"]["width"]["50%"], found["captions"]["words"]["max"])
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        to: str or path. A folder, to which go `report.json` and `report.png`. Defaults
            to `None`: none.
        tokens: bool. Whether to count tokens of CLIP's vocabulary, the marks of start
            and end too, which needs open_clip installed. Defaults to `False`.
        image_keys: str or sequence of str; see `image_text_dataset`.
        caption_key: str or sequence of str; see `image_text_dataset`.
        resume: str or path. A file that keeps what was found: when started again with
            it, the report goes on from there. Defaults to `None`: none.
        num_threads: int. How many pictures are decoded at a time. Defaults to `None`:
            the number of processors.
        verbose: bool. Whether to show progress on stderr. Defaults to `False`.

    Returns:
        dict: `"samples"`, how many are whole; `"pictures"`, quantiles of `"width"`,
        `"height"` (upright, in pixels), `"pixels"`, `"aspect"` (width / height) and
        `"bytes"`, and counts of `"formats"` and `"modes"` (as Pillow calls the kinds of
        colours); `"captions"`, their `"count"`, how many are `"distinct"`, the share of
        those that come `"repeated"`, the `"most_frequent"`, quantiles of
        `"characters"`, `"words"` and `"tokens"`, and the share `"over_77_tokens"`, of
        which CLIP reads the start alone; and `"broken"`, `"by_reason"` and
        `"first_broken"` as `convert` returns them. Of a data set without a whole
        sample, quantiles are None.

    Raises:
        FileNotFoundError: if a shard is missing.
        ImportError: if `tokens` is true and open_clip is not installed.
        ValueError: if an argument does not make sense, or `resume` is about something
            else.
    """
    samples = Samples(source, image_keys, caption_key)
    tokenizer = CLIPTokenizer.from_open_clip(MAX_TOKENS) if tokens else None
    findings = survey(
        NAME,
        samples,
        _looker(tokenizer),
        {"tokens": tokens},
        resume,
        num_threads,
        verbose,
    )
    tally = _Tally(findings)
    found = tally.summary(tokens)
    if to is not None:
        to = os.fspath(to).rstrip("/")
        write_json(f"{to}/report.json", found)
        write_figure(f"{to}/report.png", draw_report(found, tally.numbers))
    return found


def _looker(tokenizer):
    def look(pair):
        content = read_image(pair.image)
        decode(content)
        picture = Picture(content)
        height, width = picture.size
        return {
            "width": width,
            "height": height,
            "bytes": len(content),
            "format": picture.format,
            "mode": picture.mode,
            "captions": [_measure(text, tokenizer) for text in pair.captions],
        }

    return look


def _measure(text, tokenizer):
    length = 0
    if tokenizer is not None:
        # Zeros behind the end; its own id is the highest.
        length = int(np.flatnonzero(tokenizer([text])[0])[-1]) + 1
    content = text.encode("utf-8", "surrogatepass")
    return {
        "characters": len(text),
        "words": len(text.split()),
        "tokens": length,
        "hash": hashlib.blake2b(content, digest_size=8).hexdigest(),
        "start": text[:START],
    }


class _Tally:
    """Sums up what was found on samples.

    Args:
        findings: iterable of dicts.

    Attributes:
        numbers: dict from a name to an array.
    """

    def __init__(self, findings):
        numbers = {name: [] for name in OF_PICTURES + OF_CAPTIONS}
        self._faults = FaultCount()
        self._formats, self._modes = collections.Counter(), collections.Counter()
        self._texts, self._starts = collections.Counter(), {}
        for found in findings:
            if "reason" in found:
                self._faults.add(found["shard"], found["key"], found["reason"])
                continue
            for name in OF_PICTURES:
                numbers[name].append(found[name])
            self._formats[found["format"]] += 1
            self._modes[found["mode"]] += 1
            for caption in found["captions"]:
                for name in OF_CAPTIONS:
                    numbers[name].append(caption[name])
                self._count(caption)
        self.numbers = {name: np.array(each, "int64") for name, each in numbers.items()}
        width, height = self.numbers["width"], self.numbers["height"]
        self.numbers["pixels"] = width * height
        self.numbers["aspect"] = width / height

    def _count(self, caption):
        text = int(caption["hash"], 16)
        self._texts[text] += 1
        # Only those that come again may have to be named.
        if self._texts[text] == 2:
            self._starts[text] = caption["start"]

    def summary(self, tokens):
        """What `report` returns."""
        pictures = ("width", "height", "pixels", "aspect", "bytes")
        count = len(self.numbers["characters"])
        repeated = sum(self._texts[text] for text in self._starts)
        return {
            "samples": len(self.numbers["width"]),
            "pictures": {
                **{name: self._quantiles(name) for name in pictures},
                "formats": dict(self._formats.most_common()),
                "modes": dict(self._modes.most_common()),
            },
            "captions": {
                "count": count,
                "distinct": len(self._texts),
                "repeated": repeated / count if count else None,
                "most_frequent": self._most_frequent(),
                "characters": self._quantiles("characters"),
                "words": self._quantiles("words"),
                "tokens": self._quantiles("tokens") if tokens else None,
                "over_77_tokens": (
                    float(np.mean(self.numbers["tokens"] > CONTEXT))
                    if tokens and count
                    else None
                ),
            },
            **self._faults.summary(),
        }

    def _quantiles(self, name):
        numbers = self.numbers[name]
        if not len(numbers):
            return None
        # Values that are there, none between two.
        method = "linear" if numbers.dtype.kind == "f" else "lower"
        values = np.quantile(numbers, list(QUANTILES.values()), method=method)
        return dict(zip(QUANTILES, values.tolist()))

    def _most_frequent(self):
        often = ((self._texts[text], text) for text in self._starts)
        first = sorted(often, key=lambda each: -each[0])[:TOP]
        return [{"caption": self._starts[text], "count": n} for n, text in first]


def add_arguments(parser):
    """Adds the command's arguments to an `argparse` parser."""
    arguments.add_source(parser)
    parser.add_argument(
        "--to", metavar="DIR", help="write report.json and report.png into this folder"
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="count tokens of CLIP's vocabulary; needs open_clip_torch",
    )
    arguments.add_resume(parser)


def run(options):
    """Runs the command, and returns its exit status."""
    found = report(
        options.source,
        options.to,
        tokens=options.tokens,
        resume=options.resume,
        **arguments.read_options(options),
    )
    pictures, captions = found["pictures"], found["captions"]
    print(f"{found['samples']:>12,}  pictures with captions")
    print(f"{found['broken']:>12,}  broken")
    print_faults(found)
    print("\n" + " " * 22 + "".join(f"{name:>10}" for name in QUANTILES))
    _print_quantiles("width, pixels", pictures["width"])
    _print_quantiles("height, pixels", pictures["height"])
    _print_quantiles("area, megapixels", pictures["pixels"], 1e-6, 3)
    _print_quantiles("width / height", pictures["aspect"], 1, 2)
    _print_quantiles("file, kB", pictures["bytes"], 1e-3, 1)
    _print_quantiles("caption, characters", captions["characters"])
    _print_quantiles("caption, words", captions["words"])
    _print_quantiles("caption, tokens", captions["tokens"])
    print(f"\nfiles: {_counts(pictures['formats'])}")
    print(f"colours: {_counts(pictures['modes'])}")
    print(f"captions: {captions['count']:,}, {captions['distinct']:,} distinct")
    for each in captions["most_frequent"][:5]:
        print(f"{each['count']:>12,}  {printable(each['caption'])}")
    if captions["over_77_tokens"] is not None:
        print(f"longer than CLIP's 77 tokens: {captions['over_77_tokens']:.2%}")
    if options.to:
        print(f"\nwritten: {printable(options.to)}/report.json and report.png")
    return 0


def _print_quantiles(name, quantiles, scale=1, digits=0):
    if quantiles is not None:
        values = (f"{scale * value:>10,.{digits}f}" for value in quantiles.values())
        print(f"{name:<22}{''.join(values)}")


def _counts(counts):
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
