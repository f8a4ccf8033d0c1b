"""How good a model is after training with each method, at the same number of tokens.

    python benchmarks/quality.py                            # the repository's images
    python benchmarks/quality.py --data DIR                 # labeled photographs
    python benchmarks/quality.py --data DIR --caption-key json.captions --study texts
    python benchmarks/quality.py --methods random "cluster, ratio 0.75" --seeds 1
    python benchmarks/quality.py --test                     # the test split, at the end

Runs are saved eight times, and resume from there. Finished runs are read from
`--results`. The same command may be started once for each core: each process takes the
next run that no other has taken. `--costs` times a step of each method, for which the
machine must be quiet. Settings are chosen by the validation split alone.
"""

import contextlib
import fcntl
import functools
import itertools
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from quality_data import IMAGES, Data
from quality_methods import CHANGES, PATCHES, STUDIES, method_of
from quality_models import PARTS, new_model, stages_of, start_of, use_whole_images
from reporting import machine, mean_and_spread, parser, publish, write_json
from timing import interleaved

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.architecture import SIZES

# Of scores that are no percentages.
DECIMALS = {"loss": 3}


def arguments(given=None):
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--study", choices=STUDIES, default="images", help="which methods to compare")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"instead, one of {list(PATCHES)}, with {list(CHANGES)} after commas",
    )
    add("--data", default=str(IMAGES), help="folder of WebDataset shards by split")
    add("--caption-key", default="txt", help="field of captions, or of class names")
    add("--results", default="results/quality", help="folder of runs and tables")
    add("--seeds", type=int, default=3, help="runs of each method")
    add("--start-from", help="folder of a finished run, to fine-tune its weights")
    add("--half", type=int, choices=(0, 1), help="train on every second shard")
    add("--size", default="tiny", choices=SIZES, help="of `clip_backbone`")
    add("--image-size", type=int, default=48, help="side in pixels")
    add("--patch-size", type=int, default=6, help="side of a patch in pixels")
    add("--context-length", type=int, default=24, help="tokens of a whole text")
    add("--short-context", type=int, default=8, help="tokens of a masked text")
    add("--vocabulary-size", type=int, default=3000)
    add("--batch-size", type=int, default=64)
    add("--steps", type=int, default=448)
    add("--learning-rate", type=float, default=1.5e-3)
    add("--horizontal-flip", action="store_true", help="mirror every second image")
    add("--costs", action="store_true", help="time the steps of the methods first")
    add("--test", action="store_true", help="score finished runs on the test split")
    options = parsed.parse_args(given)
    for name in options.methods or ():
        try:
            method_of(name)
        except ValueError as error:
            parsed.error(str(error))
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

    costs = cached_costs(folder / "costs.json", names, options, data_of)
    seeds = range(1, options.seeds + 1)
    for seed, name in itertools.product(seeds, names):
        with claim(place_of(name, seed, folder)) as is_mine:
            if is_mine:
                train(name, seed, options, data_of, costs, folder)
    # Those of other processes, too.
    runs = [
        read_run(name, seed, options, folder)
        for seed, name in itertools.product(seeds, names)
    ]
    runs = [run for run in runs if "validation" in run]
    if not runs:
        print("No run is finished yet.")
        return
    report(runs, costs, options, folder / f"{title}.json")


@contextlib.contextmanager
def claim(place):
    """Whether a run is free; no other process takes it in the meantime."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def place_of(name, seed, folder):
    """The folder of a run."""
    return folder / name.replace(",", "").replace(" ", "_") / f"seed-{seed}"


def read_run(name, seed, options, folder):
    """The finished run, or its setting alone."""
    path = place_of(name, seed, folder) / "result.json"
    setting = setting_of(name, seed, options)
    result = json.loads(path.read_text()) if path.exists() else {"setting": setting}
    if result["setting"] != setting:
        raise ValueError(
            f"`--results` must be a folder of runs of the same settings. Received: "
            f"{path}, a run of {result['setting']} instead of {setting}"
        )
    return result


def train(name, seed, options, data_of, costs, folder):
    """Trains one model, or the rest of an interrupted run, and scores it.

    Returns:
        The finished run as a dictionary, also written to a file: the validation scores
        after every part (`curve`) and at the end.
    """
    method = method_of(name)
    place = place_of(name, seed, folder)
    path = place / "result.json"
    result = read_run(name, seed, options, folder)
    data = data_of(method)
    weights = place / "backbone.weights.h5"
    if "validation" in result:
        if options.test and "test" not in result:
            model = new_model(method, options, data, seed, result["steps"])
            model.backbone.load_weights(weights)
            write_json(path, **result, test=data.scores(model, "test"))
        return json.loads(path.read_text())

    steps = options.steps
    if method.equal_time:
        cost = costs[without_equal_time(name)]
        steps = PARTS * round(steps * costs["random"] / cost / PARTS)
    model = new_model(method, options, data, seed, steps)
    result |= {"steps": steps, "curve": []}
    for stage, epochs in stages_of(method).items():
        if stage == "whole" and method.whole_images:
            use_whole_images(model)
        history = model.fit(
            data.training(seed, method, stage == "whole" and method.whole_texts),
            steps_per_epoch=steps // PARTS,
            epochs=epochs,
            verbose=0,
            resume_from=place / stage,
            callbacks=[
                data.callback(),
                kcm.callbacks.Checkpoint(place / stage),
                Show(f"{name}, seed {seed}, {stage}"),
            ],
        ).history
        for index in range(epochs):
            logs = {key: values[index] for key, values in history.items()}
            step = (len(result["curve"]) + 1) * steps // PARTS
            point = {"step": step, "loss": logs["loss"], "score": score(logs)}
            result["curve"].append(point)
    model.backbone.save_weights(weights)
    for split in ["validation"] + ["test"] * options.test:
        result[split] = data.scores(model, split)
    write_json(path, **result)
    return result


class Show(keras.callbacks.Callback):
    """Prints the loss and the score after each part of a run."""

    def __init__(self, title):
        super().__init__()
        self.title = title

    def on_epoch_end(self, epoch, logs=None):
        print(
            f"{self.title}, part {epoch + 1}: loss {logs['loss']:.3f}, "
            f"validation {score(logs):.1f} %",
            flush=True,
        )


def score(logs):
    """The score, in percent, from the logs of an epoch."""
    recalls = [value for key, value in logs.items() if "recall@10" in key]
    values = recalls or [logs["val_zero_shot_top_1"]]
    return 100 * sum(values) / len(values)


def setting_of(name, seed, options):
    """What a run depends on, as in its file."""
    shared = {"caption_key", "horizontal_flip"} | {
        key for key, value in vars(options).items() if isinstance(value, int | float)
    }
    shared -= {"seeds", "test", "costs"}
    setting = {key: getattr(options, key) for key in sorted(shared)}
    # The data by its name alone: a folder of results may move with its runs.
    setting |= {"data": Path(options.data).resolve().name, "size": options.size}
    if options.start_from:
        setting["start_from"] = start_of(options)
    return {
        "method": name,
        "seed": seed,
        "backend": keras.backend.backend(),
        **setting,
    }


def without_equal_time(name):
    return name.removesuffix(", equal time")


def data_by_method(options):
    """A function from a method to its data, which is read once for each image size."""
    at = functools.cache(functools.partial(Data, options))

    def data_of(method):
        # Whole patches, whatever the scale.
        patches = round(options.image_size * method.image_scale / options.patch_size)
        return at(patches * options.patch_size)

    return data_of


def cached_costs(path, names, options, data_of):
    """Milliseconds per step by method; measured only with `--costs`."""
    costs = json.loads(path.read_text())["milliseconds"] if path.exists() else {}
    wanted = {"random", *map(without_equal_time, names)} - set(costs)
    if wanted and options.costs:
        # `random` is measured each time, to compare measurements of different times.
        found = measure_costs(sorted(wanted | {"random"}), options, data_of)
        unit = costs.get("random", found["random"]) / found["random"]
        costs.update({name: round(found[name] * unit, 1) for name in wanted})
        write_json(path, machine=machine(), milliseconds=costs)
    for name in names:
        known = costs.get(without_equal_time(name))
        if known is not None:
            costs[name] = known
        elif method_of(name).equal_time:
            raise ValueError(
                "`--costs` must be given, as equal times need the time of a step. "
                f"Received: the method {name!r}"
            )
    return costs


def measure_costs(names, options, data_of, rounds=8):
    """Milliseconds per training step of each method, taken in turn.

    The machine may be busy with other things: methods alternate, and the fastest round
    of each counts.
    """
    steps = {}
    for name in names:
        method = method_of(name)
        data = data_of(method)
        for stage in stages_of(method):
            model = new_model(method, options, data, 0, 100)
            if stage == "whole" and method.whole_images:
                use_whole_images(model)
            whole_texts = stage == "whole" and method.whole_texts
            batch = next(iter(data.training(0, method, whole_texts)))
            steps[name, stage] = functools.partial(model.train_on_batch, batch)
    seconds = interleaved(steps, rounds, repeats=4)
    return {
        name: round(
            sum(
                1000 * min(seconds[name, stage]) * parts / PARTS
                for stage, parts in stages_of(method_of(name)).items()
            ),
            1,
        )
        for name in names
    }


def report(runs, costs, options, path):
    """Prints and writes mean and spread over seeds of every score."""
    by_method = {}
    for run in runs:
        setting = run["setting"]
        by_method.setdefault(setting["method"], {})[setting["seed"]] = run
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
                    (found[score] for found in scored.values()), DECIMALS.get(score, 1)
                )
            # Of runs of one seed, which start from the same weights and read the same
            # crops in the same order.
            random = {
                seed: run[split]
                for seed, run in by_method.get("random", {}).items()
                if split in run
            }
            for score in ("score", "loss"):
                gains = [
                    found[score] - random[seed][score]
                    for seed, found in scored.items()
                    if score in found and score in random.get(seed, {})
                ]
                if gains:
                    row[f"{split} {score} - random's"] = mean_and_spread(
                        gains, DECIMALS.get(score, 1)
                    )
        rows.append(row)
    title = f"{path.parent.name}, {options.steps} steps of {options.batch_size}"
    publish(path, title, rows, runs=runs)


if __name__ == "__main__":
    main()
