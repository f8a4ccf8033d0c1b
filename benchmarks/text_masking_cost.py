"""The cost of choosing the words of captions, in milliseconds a caption.

    python benchmarks/text_masking_cost.py
    python benchmarks/text_masking_cost.py --data DIR --caption-key json.captions

Captions become tokens with a text masking and with truncation, at a context of half of
their tokens; the difference is the cost of the masking.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import collections
import itertools
import statistics
from pathlib import Path

import numpy as np
from quality_data import IMAGES
from reporting import parser, publish
from timing import interleaved, ratio

import keras_cluster_mask as kcm
from keras_cluster_mask.data import byte_pairs


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--data", default=str(IMAGES), help="folder of shards, train-*.tar")
    add("--caption-key", default="txt", help="the field of the captions")
    add("--captions", type=int, default=2000, help="how many, at most")
    add("--rounds", type=int, default=15)
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    captions = kcm.data.read_captions(
        Path(options.data) / "train-*.tar", options.caption_key
    )
    whole = kcm.data.CLIPTokenizer.train(captions, 3000, context_length=77)
    lengths = np.count_nonzero(whole(captions), axis=1)
    context_length = round(statistics.fmean(lengths) / 2) + 1
    # Those that a masking has to choose from.
    captions = [c for c, n in zip(captions, lengths) if n > context_length]
    tokenizer = whole.with_context_length(context_length)
    table = kcm.data.FrequencyTextMasking().fit(captions)
    concepts = kcm.data.ConceptTextMasking(concept_graph(captions), captions)
    captions = captions[: options.captions]
    generators = [np.random.default_rng(number) for number in range(len(captions))]
    maskings = {
        "RandomTextMasking": kcm.data.RandomTextMasking(),
        "BlockTextMasking": kcm.data.BlockTextMasking(),
        "FrequencyTextMasking": table,
        "SyntaxTextMasking, without the time of its tagger": (
            kcm.data.SyntaxTextMasking(lambda words: ["NN"] * len(words))
        ),
        "ConceptTextMasking": concepts,
    }
    functions = {"truncation": lambda: tokenizer(captions)}
    for name, masking in maskings.items():
        functions[name] = lambda masking=masking: masking.tokenize(
            tokenizer, captions, generators
        )
    seconds = interleaved(functions, options.rounds)
    rows = []
    for name, found in seconds.items():
        milliseconds = 1000 * min(found) / len(captions)
        more = milliseconds - 1000 * min(seconds["truncation"]) / len(captions)
        row = {"words": name, "ms a caption": f"{milliseconds:.4f}"}
        row["more than truncation"] = f"{more:.4f}"
        row["/ truncation"] = f"{ratio(seconds, name, 'truncation'):.2f}"
        rows.append(row)
    title = (
        f"{len(captions)} captions of {lengths.mean():.1f} tokens on average, at a "
        f"context of {context_length}"
    )
    publish(f"{options.results}/text_masking_cost.json", title, rows)


def concept_graph(captions):
    """Words that occur together, and frequent pairs of neighbors as concepts."""
    words = map(byte_pairs.words_of, byte_pairs.clean_all(captions))
    counts = collections.Counter(itertools.chain(*map(itertools.pairwise, words)))
    pairs = {" ".join(pair): pair for pair, count in counts.items() if count >= 10}
    return kcm.data.co_occurrence_graph(captions) | pairs


if __name__ == "__main__":
    main()
