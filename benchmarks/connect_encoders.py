"""Two pre-trained encoders as a CLIP: projections on features, then tuning.

    python benchmarks/connect_encoders.py features heads tune --data DIR
    python benchmarks/connect_encoders.py tune --data DIR --methods random --seeds 1 2
    python benchmarks/connect_encoders.py tune --data DIR \\
        --methods "cluster 0.4" "random, short texts" "random, LoRA"
    python benchmarks/connect_encoders.py heads --data DIR --test   # once, at the end

`--encoders` is a folder with keras_hub presets of DINOv2 and MiniLM. Stages resume
where they were interrupted, and finished runs are read from `--results`. Settings are
chosen by the validation split alone. Equal time is in steps: `--costs` measures the
processor time of a step of each method.
"""

import argparse
import functools
import json
import os
import re
import resource
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
from keras import ops
from quality_data import loss_at_best_temperature
from reporting import machine, mean_and_spread, parser, publish, write_json
from timing import interleaved

import keras_cluster_mask as kcm

STAGES = ("features", "heads", "tune", "report")
SPLITS = ("train", "validation", "test")
PROJECTION_DIM = 512
# By name: the masking of images, from the encoder and the ratio.
MASKINGS = {
    "none": lambda encoder, ratio: None,
    "random": lambda encoder, ratio: kcm.RandomMasking(ratio),
    "cluster": lambda encoder, ratio: kcm.ClusterMasking(mask_ratio=ratio),
    "softer cluster": lambda encoder, ratio: kcm.ClusterMasking(
        mask_ratio=ratio, softness=0.3
    ),
    "kmeans": lambda encoder, ratio: kcm.KMeansMasking(mask_ratio=ratio),
    "edges": lambda encoder, ratio: kcm.EdgeMasking(mask_ratio=ratio),
    "centered": lambda encoder, ratio: kcm.CenteredMasking(ratio),
    "attentive": lambda encoder, ratio: kcm.AttentiveMasking(
        kcm.models.MomentumEncoder(encoder), ratio
    ),
}
# What a method may do besides. LoRA has ten times the rate of encoders. After "rate"
# follows another `--learning-rate`.
SHORT_TEXTS, LORA, LAST_BLOCKS = "short texts", "LoRA", "last blocks"
WHOLE_LAST = "whole images last"
# Four fifths of an average caption.
SHORT_LENGTH = 12
METHOD = re.compile(
    r"(?P<name>[a-z ]+?)(?: (?P<ratio>0\.\d+))?"
    rf"(?:, (?P<more>{SHORT_TEXTS}|{LORA}|{LAST_BLOCKS}|{WHOLE_LAST}|"
    r"rate (?P<rate>[\d.]+(e-\d+)?)))?"
)


def common_arguments(description):
    """Those that models, data and results depend on."""
    parsed = parser(description)
    add = parsed.add_argument
    add(
        "--encoders",
        default=os.environ.get("KERAS_CLUSTER_MASK_ENCODERS"),
        required="KERAS_CLUSTER_MASK_ENCODERS" not in os.environ,
        help="folder of encoders, or KERAS_CLUSTER_MASK_ENCODERS",
    )
    add("--data", required=True, help="folder of WebDataset shards by split")
    add("--caption-key", default="json.captions", help="field of captions")
    add("--results", default="results/encoders", help="folder of runs and tables")
    add("--features", default="results/features", help="folder of features")
    add("--seeds", type=int, nargs="*", default=[1, 2, 3])
    add(
        "--methods",
        nargs="+",
        type=method_of,
        default=["none", "random"],
        help=f"one of {', '.join(MASKINGS)}, with a ratio other than 0.5 after it, and "
        f"', {SHORT_TEXTS}', ', {LORA}', ', {LAST_BLOCKS}', ', {WHOLE_LAST}' or, such "
        "as, ', rate 1e-5'",
    )
    add("--image-size", type=int, default=168, help="side in pixels")
    add("--batch-size", type=int, default=64, help="of tuning")
    return parsed


def arguments():
    parsed = common_arguments(__doc__)
    add = parsed.add_argument
    add("stages", nargs="+", choices=STAGES)
    add("--head-epochs", type=int, default=30)
    add("--head-batch-size", type=int, default=512)
    add("--epochs", type=int, default=1, help="of tuning")
    add(
        "--equal-time",
        action="store_true",
        help="as long as `random` takes",
    )
    add("--learning-rate", type=float, default=3e-5, help="of the encoders in tuning")
    add("--costs", action="store_true", help="time the steps of the methods first")
    add("--test", action="store_true", help="score on the test split")
    return parsed.parse_args()


def method_of(text):
    """Checks the name of a method."""
    match = METHOD.fullmatch(text)
    if not match or match["name"] not in MASKINGS:
        raise argparse.ArgumentTypeError(f"there is no method {text!r}")
    return text


def main():
    options = arguments()
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES[:3]:
        if stage in options.stages:
            {"features": features, "heads": heads, "tune": tune}[stage](options, folder)
    report(options, folder)


# === Models and data ===


@functools.cache
def encoders(folder, image_size):
    """Fresh encoders, with the tokenizer of the text encoder."""
    image = keras_hub.models.DINOV2Backbone.from_preset(
        f"{folder}/dinov2_small", image_shape=(image_size, image_size, 3)
    )
    text = keras_hub.models.TextEmbedder.from_preset(f"{folder}/all_minilm_l6_v2")
    return image, text


def new_model(options, seed, head, method="none"):
    """A model with the pre-trained encoders; equal seeds give equal projections."""
    image, text = encoders(options.encoders, options.image_size)
    keras.utils.set_random_seed(seed)
    match = METHOD.fullmatch(method)
    masking = MASKINGS[match["name"]](image, float(match["ratio"] or 0.5))
    return kcm.ContrastiveModel.from_encoders(
        image, text, PROJECTION_DIM, masking=masking, head=head
    )


def dataset(options, split, training, seed=0, short=False):
    shards = f"{options.data}/{split}-*.tar"
    if training:
        more = {"crop_scale": (0.6, 1.0), "seed": seed}
        _, text = encoders(options.encoders, options.image_size)
        tokenizer, batch_size = text.preprocessor, options.batch_size
        if short:
            tokenizer = type(tokenizer).from_preset(
                f"{options.encoders}/all_minilm_l6_v2", sequence_length=SHORT_LENGTH
            )
            more["text_masking"] = kcm.data.RandomTextMasking()
    else:
        more, tokenizer, batch_size = {"include_captions": "all"}, None, 50
    return kcm.data.image_text_dataset(
        shards,
        tokenizer,
        options.image_size,
        batch_size,
        training=training,
        caption_key=options.caption_key,
        **more,
    )


def scores(images, texts, owners):
    """Recall@10 in percent, both ways and their mean, and the loss, from embeddings."""
    found = kcm.evaluation.retrieval_recall(images, texts, owners, ks=10)
    both = {
        "image to text": 100 * found["image_to_text_recall@10"],
        "text to image": 100 * found["text_to_image_recall@10"],
    }
    loss = loss_of(images, texts, owners)
    return {**both, "mean": sum(both.values()) / 2, "loss": loss}


# === Features, once ===


def features(options, folder):
    """Computes the features of all splits, and writes how long it took."""
    path = folder / "features.json"
    found = json.loads(path.read_text())["splits"] if path.exists() else {}
    for split in SPLITS:
        start = time.perf_counter()
        computed = kcm.evaluation.compute_features(
            new_model(options, 0, "linear"),
            dataset(options, split, training=False),
            f"{options.features}/{split}",
        )
        if split not in found:
            found[split] = {
                "images": computed.num_images,
                "texts": computed.num_texts,
                "minutes": round((time.perf_counter() - start) / 60, 1),
                "peak memory (GB)": round(peak_memory(), 2),
            }
            write_json(path, machine=machine(), splits=found)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


# === Projections on features ===


def heads(options, folder):
    """Trains linear projections, and ones with a hidden layer, on features."""
    train = kcm.TowerFeatures(f"{options.features}/train")
    batch_size = options.head_batch_size
    steps = options.head_epochs * (train.num_images // batch_size)
    for head in ("linear", "mlp"):
        for seed in options.seeds:
            path = folder / f"head-{head}-{seed}.json"
            weights = folder / f"head-{head}-{seed}.npz"
            result = read(path, options, ("head_epochs", "head_batch_size"))
            if "validation" not in result:
                model = new_model(options, seed, head)
                model.image_encoder.trainable = model.text_encoder.trainable = False
                rate = keras.optimizers.schedules.CosineDecay(1e-3, steps)
                model.compile(keras.optimizers.AdamW(rate, weight_decay=0.1))
                start = time.perf_counter()
                model.fit(
                    train, batch_size=batch_size, epochs=options.head_epochs, verbose=0
                )
                result["seconds"] = time.perf_counter() - start
                result["pairs per second"] = steps * batch_size / result["seconds"]
                np.savez(
                    weights,
                    *[ops.convert_to_numpy(x) for x in model.head.weights],
                )
            for split in ["validation"] + ["test"] * options.test:
                if split not in result:
                    model = with_head(new_model(options, seed, head), weights)
                    result[split] = scores(
                        *embeddings_of(projections_of(model), options, split)
                    )
            write_json(path, **result)
            print(path.stem, result.get("validation"), flush=True)


def with_head(model, weights):
    """Loads projections and temperature that were trained before."""
    with np.load(weights) as found:
        for weight, value in zip(model.head.weights, found.values(), strict=True):
            weight.assign(value)
    return model


def embeddings_of(project, options, split):
    """The embeddings of all images and texts, from their features."""
    found = kcm.TowerFeatures(f"{options.features}/{split}")
    images, texts, rows = all_features(found)
    return *(normalized(x) for x in project(images, texts)), rows


def all_features(found):
    """The features of all images and texts, and the row of the image of each text."""
    rows = np.repeat(np.arange(found.num_images), found.counts)
    numbers = np.arange(found.num_texts) - found.first_text[rows]
    texts = found.pairs(rows, numbers)["text_features"]
    return found.pairs(slice(None))["image_features"], texts, rows


def normalized(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def projections_of(model):
    """The projections of a model as a function of features."""

    def project(images, texts):
        texts = model.text_tower.project(np.array(texts))
        both = model.image_tower.project(images), texts
        return [ops.convert_to_numpy(ops.stop_gradient(x)) for x in both]

    return project


# === Tuning ===


def tune(options, folder):
    """Tunes both encoders, from the projections of the same seed."""
    costs = cached_costs(options, folder)
    # Tuning itself does not read the features.
    facts = json.loads((folder / "features.json").read_text())
    pairs = facts["splits"]["train"]["images"]
    for seed in options.seeds:
        for method in options.methods:
            steps = options.epochs * (pairs // options.batch_size)
            if options.equal_time:
                shares = shares_of(method).items()
                cost = sum(share * costs[part] for part, share in shares)
                steps = round(steps * costs["random"] / cost)
            tune_one(method, seed, steps, options, folder)


def shares_of(method):
    """The methods whose steps a method consists of, with the share of each."""
    match, base = METHOD.fullmatch(method), method.partition(",")[0]
    if match["more"] == WHOLE_LAST:
        return {base: 7 / 8, "none": 1 / 8}
    return {base if match["rate"] else method: 1}


def name_of(method, seed, options):
    time_of = "equal_time" if options.equal_time else "equal_steps"
    return f"tune-{method}-{options.epochs}-{time_of}-{seed}".replace(" ", "_")


def tune_one(method, seed, steps, options, folder):
    name = name_of(method, seed, options)
    path, weights = folder / f"{name}.json", folder / f"{name}.weights.h5"
    result = read(
        path, options, ("epochs", "batch_size", "learning_rate", "equal_time")
    )
    if "validation" in result and not (options.test and "test" not in result):
        return
    if "validation" in result:
        encoders.cache_clear()
        model = new_model(options, seed, "mlp", method)
        model.load_weights(weights)
    else:
        model, found = tuned(method, seed, steps, options, folder)
        model.save_weights(weights)
        result |= found
    for split in ["validation"] + ["test"] * options.test:
        if split not in result:
            found = kcm.evaluation.embed(
                model, dataset(options, split, False), verbose=0
            )
            names = ("image_embeddings", "text_embeddings", "image_of_text")
            result[split] = scores(*(found[name] for name in names))
    write_json(path, **result)
    print(name, result["validation"], flush=True)


def tuned(method, seed, steps, options, folder):
    """Trains a model in a few epochs, each of which is saved; returns facts on it, too.

    Short texts are followed by an eighth of the steps on whole texts.
    """
    model, more = model_to_tune(options, seed, method)
    with_head(model, folder / f"head-mlp-{seed}.npz")
    epochs, first_epochs = max(1, round(steps / 24)), 0
    if more in (SHORT_TEXTS, WHOLE_LAST):
        epochs = 8 * max(1, round(steps / 96))
        first_epochs = epochs * 7 // 8
    length = max(1, round(steps / epochs))
    compile_for(model, options, epochs * length, method)
    start, losses = time.process_time(), []
    for first, last in ((0, first_epochs), (first_epochs, epochs)):
        if first == last:
            continue
        is_first = last < epochs
        stage = folder / (name_of(method, seed, options) + "-first" * is_first)
        if more == WHOLE_LAST and not is_first:
            model.maskings[0].mask_ratio = 0.0
        is_short = is_first and more == SHORT_TEXTS
        losses += model.fit(
            dataset(options, "train", True, seed, short=is_short),
            initial_epoch=first,
            steps_per_epoch=length,
            epochs=last,
            verbose=0,
            resume_from=stage,
            callbacks=[kcm.callbacks.Checkpoint(stage)],
        ).history.get("loss", [])
    return model, {
        "method": method,
        "steps": epochs * length,
        "losses": losses,
        "trained weights": int(sum(np.prod(x.shape) for x in model.trainable_weights)),
        "processor minutes of this process": (time.process_time() - start) / 60,
        "peak memory (GB)": round(peak_memory(), 2),
    }


def model_to_tune(options, seed, method):
    """A model whose weights are trained or frozen, and what else its method does."""
    encoders.cache_clear()
    model = new_model(options, seed, "mlp", method)
    more = METHOD.fullmatch(method)["more"]
    image, text = encoders(options.encoders, options.image_size)
    text = text.backbone
    if more == LORA:
        for encoder in (image, text):
            encoder.enable_lora(8)
            for weight in encoder.trainable_weights:
                weight.trainable = weight.name != "bias"
    elif more == LAST_BLOCKS:
        _, embedding, blocks, _ = image.layers
        first = [embedding, *blocks.layers[:-4], *text.layers]
        for layer in first:
            layer.trainable = False
        for layer in text.layers[-3:]:
            layer.trainable = True
    return model, more


def compile_for(model, options, steps, method):
    """Encoders have a tenth of the rate of projections, or as much with LoRA."""
    match = METHOD.fullmatch(method)
    rate = keras.optimizers.schedules.CosineDecay
    adamw = functools.partial(keras.optimizers.AdamW, weight_decay=0.05)
    tower = float(match["rate"] or options.learning_rate)
    factor = 10 if match["more"] == LORA else 1
    model.compile(
        kcm.TowerOptimizer(
            adamw(rate(10 * tower, steps)),
            image=adamw(rate(factor * tower, steps)),
            text=adamw(rate(factor * tower, steps)),
        )
    )


def loss_of(images, texts, owners):
    """The loss at the best temperature, of batches of 100 with first captions."""
    firsts = texts[np.unique(owners, return_index=True)[1]]
    return loss_at_best_temperature(
        [
            (
                images[i : i + 100],
                firsts[i : i + 100],
                np.arange(len(images[i : i + 100])),
            )
            for i in range(0, len(images), 100)
        ]
    )


def cached_costs(options, folder):
    """Processor time per step by method, in seconds; measured only with `--costs`."""
    path = folder / "costs.json"
    costs = json.loads(path.read_text())["seconds"] if path.exists() else {}
    if options.costs:
        steps = {}
        for method in {"random", *(y for x in options.methods for y in shares_of(x))}:
            model, more = model_to_tune(options, 0, method)
            model.compile(keras.optimizers.AdamW(1e-9))
            short = more == SHORT_TEXTS
            batch = next(iter(dataset(options, "train", True, short=short)))
            steps[method] = functools.partial(model.train_on_batch, batch)
        found = interleaved(steps, rounds=3, clock=time.process_time)
        costs |= {method: min(seconds) for method, seconds in found.items()}
        write_json(path, machine=machine(), seconds=costs)
    return costs


# === Reporting ===


def read(path, options, names):
    """The results of a run, or its setting alone."""
    setting = {name: getattr(options, name) for name in names}
    setting |= {"image_size": options.image_size, "data": Path(options.data).name}
    found = json.loads(path.read_text()) if path.exists() else {"setting": setting}
    if found["setting"] != setting:
        raise ValueError(
            "`--results` must be a folder of runs of the same settings. Received: "
            f"{path}, a run of {found['setting']} instead of {setting}"
        )
    return found


def report(options, folder):
    """Prints and writes the mean and the spread over seeds of all finished runs."""
    groups, runs = {}, {}
    for path in sorted([*folder.glob("head-*.json"), *folder.glob("tune-*.json")]):
        run = json.loads(path.read_text())
        if "validation" in run:
            runs[path.stem] = run
            groups.setdefault(path.stem.rpartition("-")[0], []).append(run)
    rows = []
    for name, mine in groups.items():
        row = {"run": name, "seeds": len(mine), "steps": mine[0].get("steps", "")}
        for split in ("validation", "test"):
            scored = [run[split] for run in mine if split in run]
            for score in scored[0] if scored else ():
                decimals = 3 if score == "loss" else 1
                row[f"{split}, {score}"] = mean_and_spread(
                    [each[score] for each in scored], decimals
                )
        rows.append(row)
    costs = cached_costs(argparse.Namespace(costs=False), folder)
    # In steps of `random`.
    costs = {method: seconds / costs["random"] for method, seconds in costs.items()}
    more = {"runs": runs, "time of a step": costs}
    publish(folder / "connect_encoders.json", "Two pre-trained encoders", rows, **more)
    plot(folder, runs, costs)


def plot(folder, runs, costs):
    """Draws recall against the time of tuning, from the projections on.

    Methods of one masking have its color.
    """
    before = [x["validation"]["mean"] for k, x in runs.items() if "head-mlp" in k]
    lines = {}
    for run in runs.values():
        if run.get("method") in costs:
            time_of = run["steps"] * costs[run["method"]]
            points = lines.setdefault(run["method"], {0.0: before})
            points.setdefault(time_of, []).append(run["validation"]["mean"])
    if not lines:
        return
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    colors = {name: f"C{number}" for number, name in enumerate(MASKINGS)}
    markers = iter("s^DvP*X<>" * len(lines))
    for method, points in lines.items():
        name, times = METHOD.fullmatch(method)["name"], sorted(points)
        style = ("o", "-") if name == method else (next(markers), ":")
        means = [np.mean(points[x]) for x in times]
        spreads = [np.std(points[x], ddof=len(points[x]) > 1) for x in times]
        axes.errorbar(
            times,
            means,
            spreads,
            color=colors[name],
            marker=style[0],
            linestyle=style[1],
            capsize=3,
            label="whole images" if method == "none" else method,
        )
    time_label = "training time, in steps on a random half"
    axes.set(xlabel=time_label, ylabel="recall@10 (%), validation")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(folder / "tuning.png", dpi=150)


if __name__ == "__main__":
    main()
