"""Whether scores say that no photograph matches a search.

    python benchmarks/no_match.py --model photos.keras --data DIR

Each test caption of Flickr8k is searched among the test photographs, once with its own
photograph and once without. For some things, captions that name the thing are searched
once among all photographs, and once among those without the thing. Prints the area
under the ROC curve of several scores of a search: 100 if one limit separates searches
with a match from those without, 50 by chance.
"""

from pathlib import Path

import keras
import numpy as np
from reporting import parser, publish
from sklearn.metrics import roc_auc_score

import keras_cluster_mask as kcm

RESULTS = Path(__file__).parent / "results"
THINGS = (
    *("dog", "snow", "beach", "bike", "horse", "ball", "water"),
    *("child", "car", "guitar", "climb"),
)


def main():
    parsed = parser(__doc__)
    parsed.add_argument("--model", required=True, help="a tuned model, .keras")
    parsed.add_argument("--data", required=True, help="shards of Flickr8k")
    parsed.add_argument("--stored", type=int, default=500, help="number of captions")
    options = parsed.parse_args()
    model = keras.saving.load_model(options.model)
    data = kcm.data.image_text_dataset(
        f"{options.data}/test-*.tar", model, training=False, include_captions=True
    )
    found = kcm.evaluation.embed(model, data)
    captions = [text for texts in found["captions"] for text in texts]
    images, texts = found["image_embeddings"], found["text_embeddings"]
    stored = kcm.data.read_captions(f"{options.data}/train-*.tar")
    generator = np.random.default_rng(0)
    stored = generator.choice(stored, options.stored, replace=False)
    usual = model.encode_text([*stored]) @ images.T
    similarity, own = texts @ images.T, found["image_of_text"]
    others = similarity.copy()
    others[np.arange(len(own)), own] = -np.inf
    rows = [row("own photograph", len(own), similarity, others, usual)]
    for thing in THINGS:
        named = np.array([thing in caption.lower() for caption in captions])
        shown = np.isin(np.arange(len(images)), own[named])
        without = np.where(shown, -np.inf, similarity)
        rows.append(row(thing, named.sum(), similarity[named], without[named], usual))
    publish(
        RESULTS / "no_match.json",
        "Searches with and without a match: area under the ROC curve (%)",
        rows,
        model=str(options.model),
    )


def row(removed, count, present, absent, usual):
    """Areas for scores of the same searches with and without the match."""
    labels = np.repeat([1, 0], len(present))
    found = {"removed": removed, "searches": int(count)}
    for name, score in SCORES.items():
        values = np.concatenate([score(present, usual), score(absent, usual)])
        found[name] = round(100 * roc_auc_score(labels, values), 1)
    return found


def best(scores, usual):
    """The similarity of the first photograph."""
    return scores.max(1)


def standard_score(scores, usual):
    """The first photograph among all photographs, in standard deviations."""
    kept = np.ma.masked_invalid(scores)
    return (scores.max(1) - kept.mean(1)) / kept.std(1)


def above_stored(scores, usual):
    """The first photograph, less its mean similarity to the stored captions."""
    first = scores.argmax(1)
    return scores.max(1) - usual.mean(0)[first]


def rank_among_stored(scores, usual):
    """The share of stored captions that describe the first photograph worse."""
    first = scores.argmax(1)
    return (usual[:, first] < scores.max(1)).mean(0)


def lead(scores, usual):
    """The first photograph, less the second."""
    second, first = np.sort(scores, axis=1)[:, -2:].T
    return first - second


SCORES = {
    "similarity": best,
    "standard score": standard_score,
    "above stored captions": above_stored,
    "rank among stored captions": rank_among_stored,
    "lead over the second": lead,
}


if __name__ == "__main__":
    main()
