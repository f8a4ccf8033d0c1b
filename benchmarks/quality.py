"""How good a model is after training with each method, at the same number of tokens.

    python benchmarks/quality.py                            # the repository's images
    python benchmarks/quality.py --data DIR                 # labelled photographs
    python benchmarks/quality.py --data DIR --caption-key json.captions --study texts
    python benchmarks/quality.py --methods random cluster --seeds 1
    python benchmarks/quality.py --test                     # the test split, at the end

Runs are saved eight times, and resume from there. Finished runs are read from
`--results`, so several commands with different `--methods` may share a folder, each on
a core of its own, and one command at the end makes the table of all. Settings are
chosen by the validation split alone.
"""

import functools
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from quality_data import IMAGES, Data
from quality_methods import METHODS, STUDIES
from quality_plots import plot_cost_quality, plot_learning_curves
from reporting import machine, mean_and_spread, parser, publish, write_json
from timing import interleaved

import keras_cluster_mask as kcm

# A run has so many parts; after each the model is scored and saved.
PARTS = 8


def arguments(given=None):
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--study", choices=STUDIES, default="images", help="which methods to compare")
    add("--methods", nargs="+", metavar="METHOD", help=f"instead: {list(METHODS)}")
    add("--data", default=str(IMAGES), help="folder of WebDataset shards by split")
    add("--caption-key", default="txt", help="field of captions, or of class names")
    add("--results", default="results/quality", help="folder of runs and tables")
    add("--seeds", type=int, default=3, help="runs of each method")
    add("--size", default="tiny", help="of the model, a size of `clip_backbone`")
    add("--image-size", type=int, default=48, help="side in pixels")
    add("--patch-size", type=int, default=6, help="side of a patch in pixels")
    add("--context-length", type=int, default=24, help="tokens of a whole text")
    add("--short-context", type=int, default=8, help="tokens of a masked text")
    add("--vocabulary-size", type=int, default=3000)
    add("--batch-size", type=int, default=64)
    add("--steps", type=int, default=448)
    add("--learning-rate", type=float, default=1.5e-3)
    add("--horizontal-flip", action="store_true", help="mirror every second image")
    add("--test", action="store_true", help="score finished runs on the test split")
    options = parsed.parse_args(given)
    unknown = sorted(set(options.methods or ()) - set(METHODS))
    if unknown:
        parsed.error(f"`--methods` must be of {list(METHODS)}. Received: {unknown}")
    if options.steps % PARTS:
        parsed.error(f"`--steps` must be a multiple of 8. Received: {options.steps}")
    return options


def main():
    options = arguments()
    name = Path(options.data).resolve().name
    folder = Path(options.results) / name
    names = options.methods or STUDIES[options.study]
    title = "chosen" if options.methods else options.study
    data_of = data_by_method(options)

    costs = {}
    if any(METHODS[name].equal_time for name in names):
        costs = cached_costs(folder / "costs.json", (), options, data_of)
    runs = []
    for seed in range(1, options.seeds + 1):
        runs += [train(name, seed, options, data_of, costs, folder) for name in names]
        # After every seed, so that a long comparison can be watched.
        report(runs, names, costs, options, folder / f"{title}.json")
    # Only now, with nothing else running, can a step be timed.
    costs = cached_costs(folder / "costs.json", names, options, data_of)
    report(runs, names, costs, options, folder / f"{title}.json")
    plot_learning_curves(runs, folder / f"{title}-learning-curves.png")
    plot_cost_quality(runs, costs, folder / f"{title}-cost-quality.png")


def train(name, seed, options, data_of, costs, folder):
    """Trains one model, or the rest of an interrupted run, and scores it.

    Returns:
        The finished run as a dictionary, also written to a file: the validation scores
        after every part (`curve`) and at the end.
    """
    method = METHODS[name]
    place = folder / name.replace(",", "").replace(" ", "_") / f"seed-{seed}"
    path = place / "result.json"
    setting = setting_of(name, seed, options)
    result = json.loads(path.read_text()) if path.exists() else {"setting": setting}
    if result["setting"] != setting:
        raise ValueError(
            f"`--results` must be a folder of runs of the same settings. Received: "
            f"{path}, a run of {result['setting']} instead of {setting}"
        )
    wanted = ["validation"] + ["test"] * options.test
    if all(split in result for split in wanted):
        return result

    data = data_of(method)
    steps = options.steps
    if method.equal_time:
        steps = PARTS * round(steps * costs["random"] / costs["none"] / PARTS)
    model = new_model(method, options, data, seed, steps)
    result |= {"steps": steps, "curve": []}
    parts = {"short": PARTS - method.whole_texts, "whole": method.whole_texts}
    for stage, epochs in parts.items():
        if not epochs:
            continue
        checkpoints = place / stage
        show = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: print(
                f"{name}, seed {seed}, part {len(result['curve']) + epoch + 1}: "
                f"loss {logs['loss']:.3f}, validation {score(logs):.1f} %",
                flush=True,
            )
        )
        history = model.fit(
            data.training(seed, method, whole_texts=stage == "whole"),
            steps_per_epoch=steps // PARTS,
            epochs=epochs,
            verbose=0,
            resume_from=checkpoints,
            callbacks=[data.callback(), kcm.callbacks.Checkpoint(checkpoints), show],
        ).history
        for index in range(epochs):
            logs = {key: values[index] for key, values in history.items()}
            step = (len(result["curve"]) + 1) * steps // PARTS
            point = {"step": step, "loss": logs["loss"], "score": score(logs)}
            result["curve"].append(point)
    for split in wanted:
        result[split] = data.scores(model, split)
    write_json(path, **result)
    return result


def score(logs):
    """The score, in percent, from the logs of an epoch."""
    recalls = [value for key, value in logs.items() if "recall@10" in key]
    values = recalls or [logs["val_zero_shot_top_1"]]
    return 100 * sum(values) / len(values)


def setting_of(name, seed, options):
    """What a run depends on, as in its file."""
    shared = {"data", "caption_key", "horizontal_flip"} | {
        key for key, value in vars(options).items() if isinstance(value, int | float)
    }
    setting = {key: getattr(options, key) for key in sorted(shared - {"seeds", "test"})}
    # The data by its name alone: a folder of results may move with its runs.
    setting |= {"data": Path(options.data).resolve().name, "size": options.size}
    return {
        "method": name,
        "seed": seed,
        "backend": keras.backend.backend(),
        **setting,
    }


def new_model(method, options, data, seed, steps):
    """A model with fresh weights, compiled; equal seeds give equal weights."""
    keras.utils.set_random_seed(seed)
    backbone = kcm.models.clip_backbone(
        options.size,
        image_size=data.image_size,
        patch_size=options.patch_size,
        vocabulary_size=data.tokenizer.vocabulary_size,
        context_length=options.context_length,
    )
    masking = method.masking and method.masking(options.patch_size)
    if method.encoder_masking is not None:
        masking = method.encoder_masking(backbone.vision_encoder, steps)
    share = options.short_context / options.context_length
    token_masking = method.token_masking and method.token_masking(share)
    model = kcm.ContrastiveModel.from_backbone(
        backbone, masking, token_masking, views=method.views
    )
    if getattr(masking, "threshold", None) is not None:
        masking.adapt(data.evaluation("train", 20))
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=steps - steps // 10,
        warmup_target=options.learning_rate,
        warmup_steps=steps // 10,
    )
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.1, beta_2=0.98))
    return model


def data_by_method(options):
    """A function from a method to its data, which is read once for each image size."""
    at = functools.cache(functools.partial(Data, options))

    def data_of(method):
        # Whole patches, whatever the scale.
        patches = round(options.image_size * method.image_scale / options.patch_size)
        return at(patches * options.patch_size)

    return data_of


def cached_costs(path, names, options, data_of):
    """Milliseconds per step, measured once for all methods that are not yet there."""
    costs = json.loads(path.read_text())["milliseconds"] if path.exists() else {}
    wanted = {"random", "none", *names} - set(costs)
    if wanted:
        # `random` is measured each time, to compare measurements of different times.
        found = measure_costs(sorted(wanted | {"random"}), options, data_of)
        unit = costs.get("random", found["random"]) / found["random"]
        costs.update({name: round(found[name] * unit, 1) for name in wanted})
        write_json(path, machine=machine(), milliseconds=costs)
    return costs


def measure_costs(names, options, data_of, rounds=8):
    """Milliseconds per training step of each method, taken in turn.

    The machine may be busy with other things: methods alternate, and the fastest round
    of each counts.
    """
    steps = {}
    for name in names:
        method = METHODS[name]
        data = data_of(method)
        model = new_model(method, options, data, 0, 100)
        batch = next(iter(data.training(0, method, whole_texts=False)))
        steps[name] = functools.partial(model.train_on_batch, batch)
    seconds = interleaved(steps, rounds, repeats=4)
    costs = {name: 1000 * min(found) for name, found in seconds.items()}
    for name in names:
        # Methods that end with whole texts mask images as `random` does.
        share = METHODS[name].whole_texts / PARTS
        costs[name] += share * (costs["random"] - costs[name])
    return {name: round(cost, 1) for name, cost in costs.items()}


def report(runs, names, costs, options, path):
    """Prints and writes mean and spread over seeds of every score."""
    by_method = {name: {} for name in names}
    for run in runs:
        by_method[run["setting"]["method"]][run["setting"]["seed"]] = run
    rows = []
    for name, mine in by_method.items():
        first = next(iter(mine.values()))
        row = {"method": name, "seeds": len(mine), "steps": first["steps"]}
        if name in costs:
            share = first["steps"] * costs[name] / (options.steps * costs["random"])
            row["training time / random"] = round(share, 2)
        for split in ("validation", "test"):
            scored = {seed: run[split] for seed, run in mine.items() if split in run}
            for score in next(iter(scored.values()), {}):
                row[f"{split} {score}"] = mean_and_spread(
                    found[score] for found in scored.values()
                )
            # Of runs of one seed, which start from the same weights and read the same
            # crops in the same order.
            gains = [
                found["score"] - by_method["random"][seed][split]["score"]
                for seed, found in scored.items()
                if split in by_method.get("random", {}).get(seed, {})
            ]
            if gains:
                row[f"{split} score - random's"] = mean_and_spread(gains)
        rows.append(row)
    title = f"{path.parent.name}, {options.steps} steps of {options.batch_size}"
    publish(path, title, rows, runs=runs)


if __name__ == "__main__":
    main()
