"""Whether weights of open_clip give open_clip's embeddings, and come back bit for bit.

    KERAS_BACKEND=jax python benchmarks/weight_parity.py
    KERAS_BACKEND=jax python benchmarks/weight_parity.py --models ViT-B-32-quickgelu

Each model is open_clip's own with random weights; biases, gains and the temperature are
moved off the 0 and 1 they start at, so that two that are exchanged are seen. Images are
noise, texts random ids that end at different places. To tell how much a difference is,
the distance between the embeddings of different images, and texts, stands beside it.
"""

import itertools
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import open_clip  # Before keras: torch crashes beside a tensorflow that came first.
import torch

# isort: split
import keras
import numpy as np
from reporting import parser, publish

import keras_cluster_mask as kcm

MODELS = ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14")
LIMIT = 1e-4  # of a coordinate of an embedding of length 1


def random_model(name, seed):
    torch.manual_seed(seed)
    model = open_clip.create_model(name, pretrained=None)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim < 2:
                weight += 0.2 * torch.randn(weight.shape)
    return model.eval()


def batch(model, rows, seed):
    """Normalized images, channels last, and token ids that end in the highest."""
    rng = np.random.default_rng(seed)
    side = model.visual.image_size[0]
    context, vocabulary = model.context_length, model.vocab_size
    images = rng.normal(size=(rows, side, side, 3)).astype("float32")
    ids = rng.integers(1, vocabulary - 1, (rows, context)).astype("int32")
    for row, end in zip(ids, np.linspace(2, context - 1, rows).astype(int)):
        row[end], row[end + 1 :] = vocabulary - 1, 0
    return {"images": images, "token_ids": ids}


def their_embeddings(model, pairs):
    with torch.no_grad():
        images = torch.tensor(pairs["images"]).permute(0, 3, 1, 2)
        texts = torch.tensor(pairs["token_ids"]).long()
        return [
            model.encode_image(images, normalize=True).numpy(),
            model.encode_text(texts, normalize=True).numpy(),
        ]


def our_embeddings(model, pairs):
    found = model.predict(pairs, batch_size=len(pairs["images"]), verbose=0)
    return [found["image_embeddings"], found["text_embeddings"]]


def smallest_distance(embeddings):
    """Of any two rows, the largest difference of a coordinate, at least."""
    pairs = itertools.combinations(embeddings, 2)
    return min(float(np.abs(x - y).max()) for x, y in pairs)


def count_different(actual, expected):
    """How many entries of two state dicts differ in name, shape, dtype or any bit."""
    return sum(
        name not in actual
        or name not in expected
        or actual[name].shape != expected[name].shape
        or actual[name].dtype != expected[name].dtype
        or actual[name].tobytes() != expected[name].tobytes()
        for name in actual.keys() | expected.keys()
    )


def compare(name, rows, seed):
    """A row of the table, and whether all in it is as it should be."""
    reference = random_model(name, seed)
    state = {key: x.numpy() for key, x in reference.state_dict().items()}
    pairs = batch(reference, rows, seed)
    expected = their_embeddings(reference, pairs)

    model = kcm.interop.load_open_clip(state, name)
    actual = our_embeddings(model, pairs)
    returned = kcm.interop.open_clip_state_dict(model)
    differing = count_different(returned, state)
    del returned
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.safetensors"
        kcm.interop.save_open_clip(model, path)
        weights = [keras.ops.convert_to_numpy(v) for v in model.backbone.weights]
        del model
        again = kcm.interop.load_open_clip(path).backbone
    # Of the weights, to which nothing was done but to write and to read them.
    changed = sum(
        x.tobytes() != keras.ops.convert_to_numpy(v).tobytes()
        for x, v in zip(weights, again.weights, strict=True)
    )

    differences = [float(np.abs(x - y).max()) for x, y in zip(actual, expected)]
    row = {
        "model": name,
        "weights (millions)": f"{sum(x.size for x in state.values()) / 1e6:.1f}",
        "images: largest difference": f"{differences[0]:.1e}",
        "between images": f"{smallest_distance(expected[0]):.1e}",
        "texts: largest difference": f"{differences[1]:.1e}",
        "between texts": f"{smallest_distance(expected[1]):.1e}",
        "entries": len(state),
        "changed on the way to Keras and back": differing,
        "to open_clip and back": changed,
    }
    return row, max(differences) <= LIMIT and not differing and not changed


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--models", nargs="+", default=MODELS, metavar="MODEL", help=f"of {MODELS}")
    add("--batch-size", type=int, default=4, help="images, and texts")
    add("--seed", type=int, default=0)
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    rows, right = [], True
    progress = keras.utils.Progbar(len(options.models), unit_name="model")
    for name in options.models:
        row, as_expected = compare(name, options.batch_size, options.seed)
        rows.append(row)
        right &= as_expected
        progress.add(1)
    backend = keras.backend.backend()
    publish(
        f"{options.results}/weight_parity-{backend}.json",
        f"Weights of open_clip in Keras on {backend}: "
        f"{'all' if right else 'NOT all'} within {LIMIT} and bit for bit",
        rows,
        options=vars(options),
    )
    sys.exit(not right)


if __name__ == "__main__":
    main()
