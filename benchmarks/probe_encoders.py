"""What maskings take away from encoders, and what tuned encoders still know.

    python benchmarks/probe_encoders.py losses --data DIR --runs random cluster
    python benchmarks/probe_encoders.py transfer --data DIR --classes CIFAR10
    python benchmarks/probe_encoders.py averages --data DIR --classes CIFAR10
    python benchmarks/probe_encoders.py sizes --data DIR --sizes 168 196 224

`losses`, on torch: the loss of validation images in which patches are left out, with
projections that were trained on whole images. `transfer`: zero-shot accuracy and a
linear probe of each tuned model on photographs of single objects, whose caption ends in
the class. `averages`: weights between those before and after tuning. `sizes`: tuned
models on larger images. All need the runs of `connect_encoders.py` in `--results`.
"""

import itertools
import json
from pathlib import Path

import connect_encoders as runs  # Chooses torch.
import numpy as np
import torch
from keras import ops
from reporting import publish
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, ShuffleSplit

import keras_cluster_mask as kcm


def main():
    parsed = runs.common_arguments(__doc__)
    stages = {x.__name__: x for x in (losses, transfer, averages, sizes)}
    parsed.add_argument("stage", choices=stages)
    parsed.add_argument("--draws", type=int, default=3, help="of masks for each image")
    parsed.add_argument("--classes", help="folder of shards with a class in captions")
    parsed.add_argument("--count", type=int, default=2000, help="images of a split")
    shares = {"type": float, "nargs": "*", "default": [0, 0.25, 0.5, 0.75, 1]}
    parsed.add_argument("--shares", help="of the tuned weights", **shares)
    parsed.add_argument("--sizes", type=int, nargs="*", default=[168, 196, 224])
    parsed.add_argument("--weights", help="those of another run, such as of levers.py")
    options = parsed.parse_args()
    runs.prepare(options)
    stages[options.stage](options)


# === Loss without retraining ===


def losses(options, num_images=400):
    """Compares maskings on the first validation images, at their first captions."""
    model = runs.new_model(options, 0)
    _, texts, rows = runs.all_features(runs.features_of(options, "validation", model))
    batches = runs.dataset(options, "validation", model)
    images = np.concatenate([batch["images"] for batch in batches])[:num_images]
    found = []
    for run in options.runs:
        runs.encoders.cache_clear()
        model = runs.new_model(options, 0, tuning=run)
        draws = 1 if run.masking == "none" else options.draws
        seen = [masked_features(model, images) for _ in range(draws)]
        # By seed, the mean over masks.
        scores = []
        for seed in options.seeds:
            runs.with_head(model, f"{options.results}/head-mlp-{seed}.npz")
            project = runs.projections_of(model)
            scores.append(np.mean([loss_of(project, x, texts, rows) for x in seen]))
        row = {"run": runs.words_of(run), "loss": runs.mean_and_spread(scores, 3)}
        found.append(row)
        print(row, flush=True)
    publish(Path(options.results) / "masked_losses.json", "Masked, not tuned", found)


def loss_of(project, images, texts, rows):
    own = rows < len(images)
    both = map(runs.normalized, project(images, texts[own]))
    return runs.loss_of(*both, rows[own])


def masked_features(model, images, batch_size=50):
    """Features of images as in training, with patches left out."""
    mean, std = (np.array(x) for x in (model.pixel_mean, model.pixel_std))
    found = []
    for i in range(0, len(images), batch_size):
        pixels = (images[i : i + batch_size] / 255 - mean) / std
        with torch.no_grad():
            features = model.image_encoder(pixels.astype("float32"), training=True)
        found.append(ops.convert_to_numpy(features))
    return np.concatenate(found)


# === Other images ===


def transfer(options):
    """Scores the tuned models, and the one before, on images of other classes."""
    test, names = labeled_test(options)
    images, classes = labeled_images(options, "train")
    train = images, np.array([names.index(x) for x in classes])
    folder, found = Path(options.results), []
    path = folder / "transfer.json"
    if path.exists():
        found = json.loads(path.read_text())["rows"]
    before = [f"head-mlp-{seed}" for seed in options.seeds]
    tuned = [x.name.removesuffix(".weights.h5") for x in folder.glob("*.weights.h5")]
    for name in [*before, *sorted(tuned)]:
        if name in {row["run"] for row in found}:
            continue
        runs.encoders.cache_clear()
        if name in before:
            model = runs.new_model(options, 0)
            runs.with_head(model, folder / f"{name}.npz")
        else:
            run = json.loads((folder / f"{name}.json").read_text())["run"]
            model = runs.model_to_tune(options, 0, runs.Tuning(**run))
            model.load_weights(folder / f"{name}.weights.h5")
        evaluation = kcm.evaluation
        scores = evaluation.evaluate_zero_shot(model, test, names, verbose=0)
        embedded = [evaluation.embed(model, x, verbose=0) for x in (train, test)]
        features, labels = embedded[0]["image_embeddings"], embedded[0]["labels"]
        probe = GridSearchCV(
            LogisticRegression(max_iter=1000),
            {"C": np.logspace(-6, 6, 25)},
            cv=ShuffleSplit(1, test_size=0.2, random_state=0),
        ).fit(features, labels)
        features, labels = embedded[1]["image_embeddings"], embedded[1]["labels"]
        found.append(
            {
                "run": name,
                "zero-shot": 100 * scores["top_1"],
                "linear probe": 100 * probe.score(features, labels),
            }
        )
        publish(path, "Transfer to other photographs", found, classes=names)


def averages(options):
    """Scores means of the weights before and after tuning."""
    test, names = labeled_test(options)
    found = []
    for run, seed in itertools.product(options.runs, options.seeds):
        model = runs.model_to_tune(options, seed, run)
        runs.with_head(model, f"{options.results}/head-mlp-{seed}.npz")
        before = model.get_weights()
        after = tuned(model, run, seed, options).get_weights()
        for share in options.shares:
            both = zip(before, after, strict=True)
            model.set_weights([(1 - share) * x + share * y for x, y in both])
            zero_shot = kcm.evaluation.evaluate_zero_shot(model, test, names, verbose=0)
            row = {"run": f"{runs.words_of(run)}-{seed}", "share": share}
            row["zero-shot"] = 100 * zero_shot["top_1"]
            found.append(row | runs.scores_of(model, options, "validation"))
            publish_by_commit(options, "averages", "Averages", found)


def sizes(options):
    """Scores tuned models on images of other sizes."""
    found = []
    for run, seed in itertools.product(options.runs, options.seeds):
        model = tuned(runs.model_to_tune(options, seed, run), run, seed, options)
        image, text = runs.encoders(options.encoders, options.image_size)
        for size in options.sizes:
            larger = kcm.models.with_image_size(image, size)
            larger = kcm.ContrastiveModel.from_encoders(
                larger, text, projection_dim=runs.PROJECTION_DIM, head="mlp"
            )
            trained = zip(runs.projected(larger), runs.projected(model), strict=True)
            for weight, other in trained:
                weight.assign(other)
            row = {"run": f"{runs.words_of(run)}-{seed}", "size": size}
            found.append(row | runs.scores_of(larger, options, "validation"))
            publish_by_commit(options, "sizes", "Larger images", found)


def publish_by_commit(options, name, title, rows):
    path = Path(options.results) / f"{name}.json"
    publish(path, title, rows, commit=runs.commit())


def tuned(model, run, seed, options):
    """Loads the weights of a run."""
    name = runs.name_of(run, seed, options)
    path = options.weights or Path(options.results) / f"{name}.weights.h5"
    model.load_weights(path)
    return model


def labeled_test(options):
    """Test images with numbers of their classes, and the names of all classes."""
    images, classes = labeled_images(options, "test")
    names = sorted({*classes})
    return (images, np.array([names.index(x) for x in classes])), names


def labeled_images(options, split):
    """The first images of a split, and their classes."""
    batches = kcm.data.image_text_dataset(
        f"{options.classes}/{split}-*.tar",
        None,
        options.image_size,
        100,
        training=False,
        include_captions=True,
    )
    images, labels = [], []
    for batch in batches:
        images.append(batch["images"])
        labels += [text.split()[-1] for (text,) in batch["captions"]]
        if len(labels) >= options.count:
            break
    return np.concatenate(images)[: options.count], labels[: options.count]


if __name__ == "__main__":
    main()
