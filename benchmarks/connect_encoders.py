"""Two pre-trained encoders as a CLIP: projections on features, then tuning.

    cd benchmarks
    python connect_encoders.py features heads tune --data DIR
    python connect_encoders.py heads --data DIR --heads linear "mlp images=8+10+12"
    python connect_encoders.py tune --data DIR --seeds 1 --runs "random rate=1e-4"
    python connect_encoders.py tune --data DIR --runs random none --equal-time
    python connect_encoders.py heads tune --data DIR --test   # once, at the end

`--encoders` is a folder with keras_hub presets of DINOv2 and MiniLM. A run is described
by words: its masking, and settings that differ from those of `Tuning`. Stages resume
where they were interrupted, and finished runs are read from `--results`. Settings are
chosen by the validation split alone. Equal time is in steps: `--costs` measures the
processor time of a step of each masking.
"""

import argparse
import dataclasses
import functools
import json
import os
import resource
import subprocess
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
import torch
from keras import ops
from quality_data import loss_at_best_temperature
from reporting import machine, mean_and_spread, parser, publish, write_json
from timing import interleaved

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.families import weights_by_block
from keras_cluster_mask.training import features as feature_files

STAGES = ("features", "heads", "tune", "report")
SPLITS = ("train", "validation", "test")
PROJECTION_DIM = 512
# The names of the dense layers in the blocks of DINOv2 and of BERT.
DENSE_LAYERS = (
    *("query", "key", "value", "attention_output", "fc1", "fc2"),
    *("feedforward_intermediate_dense", "feedforward_output_dense"),
)
# By name: the masking of images, from the encoder and the ratio.
MASKINGS = {
    "none": lambda encoder, ratio: None,
    "random": lambda encoder, ratio: kcm.RandomMasking(ratio),
    "cluster": lambda encoder, ratio: kcm.ClusterMasking(mask_ratio=ratio),
    "softer_cluster": lambda encoder, ratio: kcm.ClusterMasking(
        mask_ratio=ratio, softness=0.3
    ),
    "kmeans": lambda encoder, ratio: kcm.KMeansMasking(mask_ratio=ratio),
    "edges": lambda encoder, ratio: kcm.EdgeMasking(mask_ratio=ratio),
    "centered": lambda encoder, ratio: kcm.CenteredMasking(ratio),
}


@dataclasses.dataclass(frozen=True)
class Heads:
    """Projections on features.

    Attributes:
        head: `linear` or `mlp`.
        images: Numbers of blocks of the image encoder, such as `8+10+12`. The last one
            by default.
        texts: The same of the text encoder.
        photos: The number of photographs that are trained on, or 0 for all.
    """

    head: str = "mlp"
    images: str = ""
    texts: str = ""
    photos: int = 0


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A run of both encoders, from the `mlp` projections of the same seed.

    Attributes:
        masking: One of `MASKINGS`.
        ratio: The fraction of patches to leave out.
        epochs: The number of epochs.
        batch: Pairs in a step.
        micro: Pairs of a micro-batch, or 0.
        rate: The learning rate of the image encoder.
        text: That of the text encoder, in parts of `rate`.
        head: That of the projections, in parts of `rate`.
        depth: The rate of a block in parts of that of the next.
        warmup: The part of the steps in which rates rise.
        decay: The weight decay.
        crop: The smallest part of an image that a crop takes.
        lora: The rank of LoRA, or 0.
        dense: 1 for LoRA of all dense layers of the blocks, 0 for query and value.
        last: The number of last blocks of the image encoder that are trained, and half
            as many of the text encoder; or 0 for both encoders whole.
        images, texts: As in `Heads`.
    """

    masking: str
    ratio: float = 0.5
    epochs: float = 1
    batch: int = 64
    micro: int = 0
    rate: float = 3e-5
    text: float = 1
    head: float = 10
    depth: float = 1
    warmup: float = 0
    decay: float = 0.05
    crop: float = 0.6
    lora: int = 0
    dense: int = 0
    last: int = 0
    images: str = ""
    texts: str = ""


def run_of(kind, text, known):
    """Reads the description of a run: a word, then settings such as `rate=1e-4`."""
    first, *more = text.split()
    settings = dict(x.split("=", 1) for x in more)
    types = {x.name: x.type for x in dataclasses.fields(kind)}
    if not settings.keys() <= types.keys():
        raise argparse.ArgumentTypeError(f"there is no such setting in {text!r}")
    run = kind(first, **{name: types[name](x) for name, x in settings.items()})
    if first not in known:
        raise argparse.ArgumentTypeError(f"there is no {first!r}")
    return run


def words_of(run):
    """The shortest description of a run, by which its files are named."""
    first, *fields = dataclasses.fields(run)
    given = [(x.name, getattr(run, x.name), x.default) for x in fields]
    more = [f"{name}={value}" for name, value, default in given if value != default]
    return " ".join([getattr(run, first.name), *more])


def common_arguments(description, kind=Tuning):
    """Those that models, data and results depend on, and runs of a kind."""
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
        "--runs",
        nargs="*",
        type=functools.partial(run_of, kind, known=MASKINGS),
        default=[kind("none"), kind("random")],
        help=f"{', '.join(MASKINGS)}, then settings of `{kind.__name__}`",
    )
    add("--image-size", type=int, default=168, help="side in pixels")
    add("--dtype", default="mixed_bfloat16", help="the dtype policy of all models")
    add("--equal-time", action="store_true", help="as long as `random` takes")
    add("--threads", type=int, default=1)
    return parsed


def arguments():
    parsed = common_arguments(__doc__)
    add = parsed.add_argument
    add("stages", nargs="+", choices=STAGES)
    add(
        "--heads",
        nargs="*",
        type=functools.partial(run_of, Heads, known=("linear", "mlp")),
        default=[Heads("linear"), Heads("mlp")],
        help="linear or mlp, then settings of `Heads`",
    )
    add("--head-epochs", type=int, default=30)
    add("--head-batch-size", type=int, default=512)
    add("--costs", action="store_true", help="time the steps of the maskings first")
    add("--test", action="store_true", help="score on the test split")
    return parsed.parse_args()


def main():
    options = arguments()
    prepare(options)
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES[:3]:
        if stage in options.stages:
            {"features": features, "heads": heads, "tune": tune}[stage](options, folder)
    report(options, folder)


def prepare(options):
    """Sets how torch computes."""
    torch.set_num_threads(options.threads)
    keras.config.set_dtype_policy(options.dtype)
    if options.dtype == "mixed_bfloat16" and not torch.cuda.is_available():
        # On processors, torch's flash attention is slower than two matrix products.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


# === Models and data ===


@functools.cache
def encoders(folder, image_size):
    """Fresh encoders, with the tokenizer of the text encoder."""
    image = keras_hub.models.DINOV2Backbone.from_preset(
        f"{folder}/dinov2_small", image_shape=(image_size, image_size, 3)
    )
    text = keras_hub.models.TextEmbedder.from_preset(f"{folder}/all_minilm_l6_v2")
    return image, text


def new_model(options, seed, head="mlp", tuning=None, images="", texts=""):
    """A model with the pre-trained encoders; equal seeds give equal projections."""
    tuning = tuning or Tuning("none", images=images, texts=texts)
    image, text = encoders(options.encoders, options.image_size)
    keras.utils.set_random_seed(seed)
    return kcm.ContrastiveModel.from_encoders(
        image,
        text,
        projection_dim=PROJECTION_DIM,
        masking=MASKINGS[tuning.masking](image, tuning.ratio),
        head=head,
        image_blocks=numbers_of(tuning.images),
        text_blocks=numbers_of(tuning.texts),
        micro_batch_size=tuning.micro or None,
    )


def numbers_of(blocks):
    return [int(x) for x in blocks.split("+")] if blocks else None


def dataset(options, split, model, tuning=None, seed=0):
    """Training batches of a run; or a split to evaluate on, without one."""
    if tuning:
        batch_size = tuning.batch
        more = {"crop_scale": (tuning.crop, 1.0), "seed": seed}
    else:
        batch_size, more = 50, {"include_captions": True}
    return kcm.data.image_text_dataset(
        f"{options.data}/{split}-*.tar",
        model,
        batch_size=batch_size,
        training=tuning is not None,
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


def commit():
    """The commit of this program, with a plus if files were changed since."""
    command = [
        "git",
        "-C",
        Path(__file__).parent,
        "describe",
        "--always",
        "--abbrev=10",
    ]
    return subprocess.check_output([*command, "--dirty=+"], text=True).strip()


# === Features, once ===


def features(options, folder):
    """Computes the features of all blocks, and writes how long it took."""
    path = folder / "features.json"
    found = json.loads(path.read_text())["splits"] if path.exists() else {}
    blocks = ["+".join(map(str, range(1, count + 1))) for count in depths(options)]
    model = new_model(options, 0, images=blocks[0], texts=blocks[1])
    for split in SPLITS:
        start = time.process_time()
        computed = kcm.compute_features(
            model, dataset(options, split, model), f"{options.features}/{split}"
        )
        if split not in found:
            found[split] = {
                "images": computed.num_images,
                "texts": computed.num_texts,
                "processor minutes": round((time.process_time() - start) / 60, 1),
                "peak memory (GB)": round(peak_memory(), 2),
            }
            write_json(path, machine=machine(), commit=commit(), splits=found)


def depths(options):
    """The numbers of blocks of the image encoder and of the text encoder."""
    image, text = encoders(options.encoders, options.image_size)
    return image.num_layers, text.backbone.num_layers


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def features_of(options, split, model, photos=0):
    """The features of the blocks that a model has, from those of all blocks.

    Of each block there are the class token and the mean. A model without blocks has
    both of images, and the mean of texts. `photos` takes the first ones alone.
    """
    towers = model.image_encoder, model.text_encoder
    chosen = [getattr(x, "block_numbers", None) for x in towers]
    name = "-".join("+".join(map(str, x or ["last"])) for x in chosen)
    name += f"-{photos}" if photos else ""
    source, target = Path(options.features, split), Path(options.features, split, name)
    if not (target / "features.json").exists():
        target.mkdir(exist_ok=True)
        header = json.loads((source / "features.json").read_text())
        whole = kcm.TowerFeatures(source)
        photos = photos or whole.num_images
        num_texts = int(whole.counts[:photos].sum())
        images = whole.pairs(slice(photos))["image_features"]
        texts = all_features(whole)[1][:num_texts]
        columns = [*map(blocks_of, (images, texts), chosen, depths(options))]
        if chosen[1] is None:
            columns[1] = columns[1][:, columns[1].shape[1] // 2 :]
        labels = np.load(source / "caption_labels.npy", mmap_mode="r")[:num_texts]
        arrays = {
            "image_features": columns[0],
            "text_features": columns[1],
            "caption_labels": labels,
            "num_captions": whole.counts[:photos],
        }
        for array, rows in arrays.items():
            np.save(target / f"{array}.npy", rows)
        header["description"]["towers"] = feature_files.describe_towers(model)
        write_json(
            target / "features.json", **header | {"images": photos, "texts": num_texts}
        )
    return kcm.TowerFeatures(target)


def blocks_of(rows, numbers, count):
    """The columns of some blocks out of a number; of the last one by default."""
    by_block = rows.reshape(len(rows), count, -1)
    return by_block[:, [x - 1 for x in numbers or [count]]].reshape(len(rows), -1)


# === Projections on features ===


def heads(options, folder):
    """Trains projections on features."""
    for run in options.heads:
        for seed in options.seeds:
            train_heads(run, seed, options, folder)


def train_heads(run, seed, options, folder):
    name = f"head-{words_of(run)}-{seed}".replace(" ", "_")
    path, weights = folder / f"{name}.json", folder / f"{name}.npz"
    result = read(path, options, ("head_epochs", "head_batch_size"))
    settings = {"images": run.images, "texts": run.texts}
    if "validation" not in result:
        model = new_model(options, seed, run.head, **settings)
        train = features_of(options, "train", model, run.photos)
        start = time.process_time()
        train_projections(model, train, options.head_epochs, options.head_batch_size)
        result["processor seconds"] = time.process_time() - start
        result["commit"] = commit()
        save_projections(model, weights)
    for split in ["validation"] + ["test"] * options.test:
        if split not in result:
            model = with_head(new_model(options, seed, run.head, **settings), weights)
            found = features_of(options, split, model)
            result[split] = scores(*embeddings_of(projections_of(model), found))
    write_json(path, **result)
    print(path.stem, result.get("validation"), flush=True)


def train_projections(model, features, epochs=30, batch_size=512):
    """Trains the projections of a model, with frozen encoders."""
    steps = epochs * (features.num_images // batch_size)
    model.image_encoder.trainable = model.text_encoder.trainable = False
    rate = keras.optimizers.schedules.CosineDecay(1e-3, steps)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.1))
    model.fit(features, batch_size=batch_size, epochs=epochs, verbose=0)


def save_projections(model, path):
    np.savez(path, *[ops.convert_to_numpy(x) for x in projected(model)])


def projected(model):
    """The weights of the projections and the head."""
    projections = model.image_tower.projection, model.text_tower.projection
    return [weight for part in (*projections, model.head) for weight in part.weights]


def with_head(model, weights):
    """Loads projections and temperature that were trained before."""
    with np.load(weights) as found:
        for weight, value in zip(projected(model), found.values(), strict=True):
            weight.assign(value)
    return model


def embeddings_of(project, found):
    """The embeddings of all images and texts, from their features."""
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
        for run in options.runs:
            steps = round(run.epochs * (pairs // run.batch))
            if options.equal_time:
                steps = round(steps * costs["random"] / costs[cost_name(run)])
            tune_one(run, seed, steps, options, folder)


def name_of(run, seed, options):
    time_of = "equal_time" if options.equal_time else "equal_steps"
    return f"tune-{words_of(run)}-{time_of}-{seed}".replace(" ", "_")


def tune_one(run, seed, steps, options, folder):
    name = name_of(run, seed, options)
    path, weights = folder / f"{name}.json", folder / f"{name}.weights.h5"
    result = read(path, options, ("equal_time",))
    if "validation" in result and not (options.test and "test" not in result):
        return
    if "validation" in result:
        model = model_to_tune(options, seed, run)
        model.load_weights(weights)
    else:
        model, found = tuned(run, seed, steps, name, options, folder)
        model.save_weights(weights)
        result |= found
    for split in ["validation"] + ["test"] * options.test:
        if split not in result:
            result[split] = scores_of(model, options, split)
    write_json(path, **result)
    print(name, result["validation"], flush=True)


def scores_of(model, options, split):
    """Embeds a split, and scores it."""
    data = dataset(options, split, model)
    found = kcm.evaluation.embed(model, data, verbose=0)
    names = ("image_embeddings", "text_embeddings", "image_of_text")
    return scores(*(found[name] for name in names))


def tuned(run, seed, steps, name, options, folder):
    """Trains a model in parts, each of which is saved; returns facts on it, too."""
    model = model_to_tune(options, seed, run)
    head = Heads("mlp", run.images, run.texts)
    with_head(model, folder / f"head-{words_of(head)}-{seed}.npz".replace(" ", "_"))
    parts = max(1, round(steps * run.batch / 2048))
    length = max(1, round(steps / parts))
    compile_for(model, run, parts * length)
    start = time.process_time()
    losses = model.fit(
        dataset(options, "train", model, run, seed),
        steps_per_epoch=length,
        epochs=parts,
        verbose=0,
        resume_from=folder / name,
        callbacks=[kcm.callbacks.Checkpoint(folder / name)],
    ).history.get("loss", [])
    return model, {
        "run": dataclasses.asdict(run),
        "commit": commit(),
        # The runs of a study may be from several machines.
        "processor": machine()["processor"],
        "steps": parts * length,
        "losses": losses,
        "trained weights": int(sum(np.prod(x.shape) for x in model.trainable_weights)),
        "processor minutes of this process": (time.process_time() - start) / 60,
        "peak memory (GB)": round(peak_memory(), 2),
    }


def model_to_tune(options, seed, run):
    """A model whose weights are trained or frozen as a run says."""
    encoders.cache_clear()
    model = new_model(options, seed, tuning=run)
    image, text = encoders(options.encoders, options.image_size)
    text = text.backbone
    if run.lora:
        for encoder in (image, text):
            encoder.enable_lora(run.lora, DENSE_LAYERS if run.dense else None)
            for weight in encoder.trainable_weights:
                weight.trainable = weight.name != "bias"
    elif run.last:
        _, embedding, blocks, _ = image.layers
        for layer in (embedding, *blocks.layers[: -run.last], *text.layers):
            layer.trainable = False
        for layer in text.layers[-(run.last + 1) // 2 :]:
            layer.trainable = True
    return model


def compile_for(model, run, steps):
    """Compiles a model with the rates of a run, by depth."""
    warmup = round(run.warmup * steps)

    def adamw(rate):
        start, target = (0.0, rate) if warmup else (rate, None)
        schedule = keras.optimizers.schedules.CosineDecay(
            start, steps - warmup, warmup_target=target, warmup_steps=warmup
        )
        return keras.optimizers.AdamW(schedule, weight_decay=run.decay)

    rates = {"image": run.rate, "text": run.text * run.rate}
    default = adamw(run.head * run.rate)
    by_path = {}
    for name, rate in rates.items():
        groups = weights_by_block(getattr(model, f"{name}_encoder"))
        for before_last, weights in enumerate(reversed(groups)):
            optimizer = adamw(rate * run.depth**before_last)
            by_path |= {weight.path: optimizer for weight in weights}
    by_path = keras.optimizers.OptimizerMap(default, by_path)
    model.compile(keras.optimizers.MultiOptimizer(by_path))


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


def cost_name(run):
    return words_of(Tuning(run.masking, run.ratio))


def cached_costs(options, folder):
    """Processor time per step by masking, in seconds; measured only with `--costs`.

    Costs are of whole models, in batches of the first run.
    """
    path = folder / "costs.json"
    costs = json.loads(path.read_text())["seconds"] if path.exists() else {}
    if options.costs:
        steps = {}
        for run in (Tuning("random", batch=options.runs[0].batch), *options.runs):
            run = Tuning(run.masking, run.ratio, batch=run.batch)
            model = model_to_tune(options, 0, run)
            model.compile(keras.optimizers.AdamW(1e-9))
            batch = next(iter(dataset(options, "train", model, run)))
            batch = model.text_tower.lengths.cut_on_host(batch)
            steps[cost_name(run)] = functools.partial(model.train_on_batch, batch)
        found = interleaved(steps, rounds=3, clock=time.process_time)
        costs |= {name: min(seconds) for name, seconds in found.items()}
        write_json(path, machine=machine(), commit=commit(), seconds=costs)
    return costs


# === Reporting ===


def read(path, options, names):
    """The results of a run, or its setting alone."""
    setting = {name: getattr(options, name) for name in ("dtype", "image_size", *names)}
    setting["data"] = Path(options.data).name
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
    costs, rows = cached_costs(argparse.Namespace(costs=False), folder), []
    if (path := folder / "features.json").exists():
        of_training = json.loads(path.read_text())["splits"]["train"]
        rows.append({"run": "features", "minutes": of_training["processor minutes"]})
    for name, mine in groups.items():
        row = {"run": name, "seeds": len(mine), "steps": mine[0].get("steps", "")}
        if seconds := seconds_of(mine[0], costs):
            row["minutes"] = round(seconds / 60, 1)
        for split in ("validation", "test"):
            scored = [run[split] for run in mine if split in run]
            for score in scored[0] if scored else ():
                decimals = 3 if score == "loss" else 1
                row[f"{split}, {score}"] = mean_and_spread(
                    [each[score] for each in scored], decimals
                )
        rows.append(row)
    more = {"runs": runs, "seconds of a step": costs}
    publish(folder / "connect_encoders.json", "Two pre-trained encoders", rows, **more)
    plot(folder, runs, costs)


def seconds_of(result, costs):
    """Processor time of a run, from its steps: a run may have been interrupted.

    `None` for runs that train a part of the encoders, whose steps were not timed.
    """
    run = Tuning(**result["run"]) if "run" in result else None
    if run is None or run.lora or run.last or cost_name(run) not in costs:
        return None
    return result["steps"] * costs[cost_name(run)] * run.batch / 64


def plot(folder, runs, costs):
    """Draws recall against the time of tuning, from the projections on.

    Each line is of runs of one masking that differ in their time alone.
    """
    before = [x["validation"]["mean"] for k, x in runs.items() if "head-mlp-" in k]
    lines = {}
    for result in runs.values():
        if seconds := seconds_of(result, costs):
            run = dataclasses.replace(Tuning(**result["run"]), epochs=1)
            points = lines.setdefault(run, {0.0: before})
            points.setdefault(seconds / 60, []).append(result["validation"]["mean"])
    # Settings with which any masking ran for two times, and all maskings with them.
    ran = {settings_of(run) for run, points in lines.items() if len(points) > 2}
    lines = {run: points for run, points in lines.items() if settings_of(run) in ran}
    if not lines:
        return
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for run, points in sorted(lines.items(), key=lambda line: -max(line[1])):
        times = sorted(points)
        axes.errorbar(
            times,
            [np.mean(points[x]) for x in times],
            [np.std(points[x], ddof=len(points[x]) > 1) for x in times],
            marker="o",
            capsize=3,
            label=label_of(run),
        )
    axes.set_xlabel("steps of tuning (minutes of one CPU core)")
    axes.set_ylabel("recall@10, validation (%)")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(folder / "tuning.png", dpi=180)


def label_of(run):
    """A masking as the pages name it."""
    whole = run.masking == "none"
    part = f"({100 * run.ratio:.0f} %)"
    name = "whole images" if whole else f"{run.masking} masking {part}"
    return name if run.depth < 1 else f"{name}, one rate for all blocks"


def settings_of(run):
    return dataclasses.replace(run, masking="", ratio=0)


if __name__ == "__main__":
    main()
