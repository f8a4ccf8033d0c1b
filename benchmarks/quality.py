"""How good a model is after training with each masking, at the same number of tokens.

    python benchmarks/quality.py                            # default images
    python benchmarks/quality.py --data DIR                 # labelled photographs
    python benchmarks/quality.py --study anchors --seeds 1
    python benchmarks/quality.py --test                     # the test split, at the end

Every run is saved after each eighth of it and resumes from there; finished runs are
read from `--results`. Settings are chosen by the validation split alone. On a
CPU, `--workers` trains several runs at a time, each on its own cores, which is faster
than one run on all of them. With `JAX_COMPILATION_CACHE_DIR` set, JAX compiles each
method once rather than once a run.
"""

import functools
import itertools
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from quality_data import IMAGES, Data, Recipe
from quality_methods import METHODS, STUDIES
from quality_plots import (
    plot_cost_quality,
    plot_learning_curves,
    plot_what_is_masked,
)
from quality_training import measure_costs, test, train
from reporting import machine, mean_and_spread, parser, publish, write_json
from workers import side_by_side


def arguments():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--study", choices=STUDIES, default="methods", help="which methods to compare")
    add("--methods", nargs="+", metavar="METHOD", help=f"instead: {list(METHODS)}")
    add("--data", default=str(IMAGES), help="folder of WebDataset shards by split")
    add("--results", default="results/quality", help="folder of runs and tables")
    add("--seeds", type=int, default=3, help="runs of each method")
    add("--workers", type=int, default=1, help="how many runs train at a time")
    add("--train-shards", type=int, help="train on the first so many shards alone")
    add("--image-size", type=int, default=48, help="side in pixels")
    add("--patch-size", type=int, default=6, help="side of a patch in pixels")
    add("--batch-size", type=int, default=64)
    add("--steps", type=int, default=450)
    add("--learning-rate", type=float, default=1.5e-3)
    add("--horizontal-flip", action="store_true", help="mirror every second image")
    add("--test", action="store_true", help="score finished runs on the test split")
    options = parsed.parse_args()
    unknown = sorted(set(options.methods or ()) - set(METHODS))
    if unknown:
        parsed.error(f"`--methods` must be of {list(METHODS)}. Received: {unknown}")
    return options


def main():
    options = arguments()
    recipe = Recipe(
        data=str(Path(options.data).resolve()),
        image_size=options.image_size,
        patch_size=options.patch_size,
        batch_size=options.batch_size,
        steps=options.steps,
        learning_rate=options.learning_rate,
        horizontal_flip=options.horizontal_flip,
        train_shards=options.train_shards,
    )
    folder = Path(options.results) / recipe.name
    names = options.methods or STUDIES[options.study]
    title = "chosen" if options.methods else options.study

    costs = {}
    if any(METHODS[name].equal_time for name in names):
        costs = cached_costs(folder / "costs.json", (), recipe)
    run = functools.partial(run_one, recipe, costs, folder, options.test)
    wanted = itertools.product(range(1, options.seeds + 1), names)
    runs = []
    for finished in side_by_side(run, wanted, options.workers):
        runs.append(finished)
        if len(runs) % len(names) == 0:
            # After every seed, so that a long comparison can be watched.
            report(runs, names, costs, recipe, folder / f"{title}.json")
    # Only now, with nothing else running, can a step be timed.
    costs = cached_costs(folder / "costs.json", names, recipe)
    report(runs, names, costs, recipe, folder / f"{title}.json")
    plot_learning_curves(runs, folder / f"{title}-learning-curves.png")
    plot_cost_quality(runs, costs, folder / f"{title}-cost-quality.png")
    images = data_at(recipe, recipe.image_size).read("validation", 100)[0]
    plot_what_is_masked(images[::20], recipe.patch_size, folder / "masks.png")


def run_one(recipe, costs, folder, with_test, seed_and_name):
    """Trains one model and scores it, or reads its stored result."""
    seed, name = seed_and_name
    method = METHODS[name]
    data = data_of(recipe, method)
    place = folder / name.replace(" ", "_").replace(",", "") / f"seed-{seed}"
    run = train(name, method, recipe, data, seed, costs, place)
    return test(run, data, place) if with_test else run


def data_of(recipe, method):
    # Whole patches, whatever the scale.
    patches = round(recipe.image_size * method.image_scale / recipe.patch_size)
    return data_at(recipe, patches * recipe.patch_size)


@functools.cache
def data_at(recipe, image_size):
    return Data(recipe, image_size)


def cached_costs(path, names, recipe):
    """Milliseconds per step, measured once for all methods that are not yet there."""
    costs = json.loads(path.read_text())["milliseconds"] if path.exists() else {}
    wanted = {"random", "none", *names} - set(costs)
    if wanted:
        # `random` is measured each time, to compare measurements of different times.
        methods = {name: METHODS[name] for name in sorted(wanted | {"random"})}
        found = measure_costs(methods, recipe, functools.partial(data_of, recipe))
        unit = costs.get("random", found["random"]) / found["random"]
        costs.update({name: round(found[name] * unit, 1) for name in wanted})
        write_json(path, machine=machine(), milliseconds=costs)
    return costs


def report(runs, names, costs, recipe, path):
    """Prints and writes mean and spread over seeds of every score."""
    by_method = {name: {} for name in names}
    for run in runs:
        by_method[run["setting"]["method"]][run["setting"]["seed"]] = run
    rows = []
    for name, mine in by_method.items():
        first = next(iter(mine.values()))
        row = {"method": name, "seeds": len(mine), "steps": first["steps"]}
        if name in costs:
            share = first["steps"] * costs[name] / (recipe.steps * costs["random"])
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
    title = f"{recipe.name}, {recipe.steps} steps of {recipe.batch_size}"
    publish(path, title, rows, runs=runs)


if __name__ == "__main__":
    main()
