"""How well finished models do on masked images.

    python benchmarks/what_is_left.py results/quality/cifar10 --data DIR

Models that `quality.py` trained (`--models`) read the validation images through each
masking (`--methods`), as in training. A masking that leaves less to go by gives a
lower score: it asks more of the model, or leaves captions without anything that
supports them.
"""

import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops
from quality_data import IMAGES, Data, Recipe
from quality_methods import METHODS, Method
from quality_training import load_finished, new_masking
from reporting import mean_and_spread, parser, publish

import keras_cluster_mask as kcm


class ClassTokenTwice(kcm.RandomMasking):
    """Leaves all patches, and gives the class token its weight among half of them.

    A model that learned from half of the patches meets twice as many in whole images,
    so that each token attends half as much to the class token. A copy beside it, which
    stays equal to it through all blocks, counts it twice.
    """

    def __init__(self, patch_size):
        super().__init__(mask_ratio=0.0)

    def call(self, tokens, images=None, training=None, noise=None):
        prefix = tokens[:, : self.num_prefix_tokens]
        rest = super().call(tokens, images=images, training=training, noise=noise)
        return ops.concatenate([prefix, rest], axis=1)


READINGS = {**METHODS, "none, class token twice": Method(ClassTokenTwice)}
MASKINGS = (
    "none",
    "none, class token twice",
    "random",
    "cluster",
    "cluster, softness 0.3",
    "cluster, 1 anchor",
    "cluster, 13 anchors",
    "cluster, 13 anchors stay",
    "threshold",
    "detail",
    "disc",
)


def arguments():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("runs", type=Path, help="folder of finished runs, one data set's")
    add("--data", default=str(IMAGES), help="folder of the shards they learned from")
    add("--models", nargs="+", default=["none", "random", "cluster"], metavar="METHOD")
    add("--methods", nargs="+", default=MASKINGS, metavar="METHOD", choices=READINGS)
    add("--images", type=int, default=5000, help="how many, at most")
    add("--seeds", type=int, nargs="+", default=[1], help="runs of each model")
    add("--name", default="what-is-left", help="of the JSON file beside the runs")
    return parsed.parse_args()


def main():
    options = arguments()
    rows = [{"masking": name} for name in options.methods]
    for trained in options.models:
        found = [scores_of(trained, seed, options) for seed in options.seeds]
        for row in rows:
            scores = [of_seed[row["masking"]] for of_seed in found]
            row[f"read by {trained!r}"] = mean_and_spread(scores)
    seeds = ", ".join(map(str, options.seeds))
    publish(
        options.runs / f"{options.name}.json",
        f"{options.runs.name}, validation score (%) of masked images, seeds {seeds}",
        rows,
        options={
            **vars(options),
            "runs": options.runs.name,
            "data": Path(options.data).name,
        },
    )


def scores_of(trained, seed, options):
    """Score by masking, of one finished run."""
    place = trained.replace(" ", "_").replace(",", "")
    folder = options.runs / place / f"seed-{seed}"
    setting = json.loads((folder / "result.json").read_text())["setting"]
    fields = {field.name for field in dataclasses.fields(Recipe)}
    recipe = Recipe(
        **{key: value for key, value in setting.items() if key in fields}
        | {"data": options.data}
    )
    if recipe.name != setting["data"]:
        raise ValueError(
            f"`--data` must be the data of the runs, {setting['data']}. "
            f"Received: {options.data}"
        )
    data = Data(recipe, recipe.image_size)
    images, captions = data.read("validation", options.images)
    backbone = load_finished(folder).backbone
    whole = kcm.ContrastiveModel.from_backbone(backbone)
    embeddings = data.embeddings(whole, images, captions)
    scores = {}
    for name in options.methods:
        keras.utils.set_random_seed(0)
        masking = new_masking(READINGS[name], recipe, data)
        model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
        embeddings["image_embeddings"] = masked_embeddings(model, images)
        scores[name] = data.judge(model, embeddings, captions)["score"]
    return scores


def masked_embeddings(model, images):
    """Embeddings of what a model's masking leaves of images."""
    embeddings = [
        keras.ops.convert_to_numpy(model.encode_image(part, training=True))
        for part in np.array_split(images, max(1, len(images) // 100))
    ]
    return np.concatenate(embeddings)


if __name__ == "__main__":
    main()
