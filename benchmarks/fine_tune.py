"""`kcm.fine_tune` on photographs, from an empty folder: recall, and minutes by stage.

    cd benchmarks
    python fine_tune.py --encoders FOLDER --data DIR
    python fine_tune.py --encoders FOLDER --data DIR --photographs 1000
    python fine_tune.py --encoders FOLDER --data DIR --sigmoid -10 --split validation

`--encoders` is a folder with keras_hub presets of DINOv2 and MiniLM. `--data` is a
folder of shards, `train-*.tar` and so on. The program writes their photographs and a
table of captions once, as a user would have them. Later seeds read the features of the
first: they depend on the frozen encoders alone. An interrupted run resumes.
"""

import csv
import itertools
import json
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import connect_encoders as runs
import keras
from reporting import machine, mean_and_spread, parser, publish, write_json

import keras_cluster_mask as kcm

STAGES = ("features", "projections", "encoders")


def arguments():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--encoders", default=os.environ.get("KERAS_CLUSTER_MASK_ENCODERS"))
    add("--data", required=True, help="folder of WebDataset shards by split")
    add("--caption-key", default="json.captions", help="field of captions")
    add("--results", default="results/fine_tune", help="folder of runs and tables")
    add("--seeds", type=int, nargs="*", default=[1, 2, 3])
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=64)
    add("--learning-rate", type=float, help="of the last blocks; by default 1e-4")
    add("--photographs", type=int, default=0, help="the first ones; 0 for all")
    add("--sigmoid", type=float, help="the initial bias of a sigmoid loss")
    add("--split", default="test", choices=("validation", "test"))
    add("--image-size", type=int, default=168, help="side in pixels")
    add("--dtype", default="mixed_bfloat16", help="the dtype policy of the model")
    add("--threads", type=int, default=1)
    return parsed.parse_args()


def main():
    options = arguments()
    runs.prepare(options)
    folder = Path(options.results)
    train = table_of(options, "train", options.photographs)
    test = table_of(options, options.split)
    for seed in options.seeds:
        run = folder / f"{name_of(options)}-{seed}"
        path = run.with_name(f"{run.name}.json")
        if not path.exists():
            first = folder / f"features-{options.photographs or 'all'}"
            if first.exists() and not run.exists():
                shutil.copytree(first, run / "features")
            write_json(path, **result_of(run, seed, train, test, options))
            if not first.exists():
                shutil.copytree(run / "features", first)
    report(folder)


def report(folder):
    """Prints and writes the mean and the spread over seeds of all finished runs."""
    groups, rows, found = {}, [], {}
    for path in sorted(folder.glob("fine_tune-*-[0-9]*.json")):
        found[path.stem] = run = json.loads(path.read_text())
        groups.setdefault(path.stem.rpartition("-")[0], []).append(run)
    for name, mine in groups.items():
        row = {"run": name, "seeds": len(mine)}
        for column in mine[0]["recall"]:
            row[column] = mean_and_spread(x["recall"][column] for x in mine)
        for stage in mine[0]["minutes"]:
            # Of the processor: other programs may have run beside it.
            minutes = [x["minutes"][stage][1] for x in mine]
            # Later seeds read the features of the first.
            minutes = minutes[:1] if stage == "features" else minutes
            row[f"{stage}, minutes"] = mean_and_spread(minutes)
        rows.append(row)
    publish(folder / "fine_tune.json", "fine_tune", rows, runs=found)


def name_of(options):
    words = [f"{options.epochs}-epochs", f"{options.photographs or 'all'}-photographs"]
    words += [] if options.batch_size == 64 else [f"batch{options.batch_size}"]
    rate = options.learning_rate
    words += [] if rate is None else [f"rate{rate:g}"]
    words += [] if options.sigmoid is None else [f"bias{options.sigmoid:g}"]
    return "-".join(["fine_tune", *words, options.split])


def table_of(options, split, count=0):
    """Writes the photographs and captions of a split as a folder with a table."""
    folder = Path(options.results, "photographs", split)
    table = folder / (f"{count}.csv" if count else "captions.csv")
    if table.exists():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    rows, field = [], options.caption_key.split(".")[1]
    for shard in sorted(Path(options.data).glob(f"{split}-*.tar")):
        with tarfile.open(shard) as files:
            for member in files:
                content = files.extractfile(member).read()
                stem, kind = member.name.split(".")
                if kind == "json":
                    captions = json.loads(content)[field]
                    rows += [(f"{stem}.jpg", caption) for caption in captions]
                elif not (folder / member.name).exists():
                    # Features depend on the dates of files.
                    (folder / member.name).write_bytes(content)
    names = [*dict.fromkeys(name for name, _ in rows)][: count or None]
    with open(table, "w", newline="") as file:
        kept = set(names)
        writer = csv.writer(file)
        writer.writerow(("file_name", "caption"))
        writer.writerows(row for row in rows if row[0] in kept)
    return table


def model_of(options, seed):
    runs.encoders.cache_clear()
    image, text = runs.encoders(options.encoders, options.image_size)
    keras.utils.set_random_seed(seed)
    model = kcm.ContrastiveModel.from_encoders(
        image,
        text,
        masking=kcm.RandomMasking(0.5),
        head="mlp",
        loss="softmax" if options.sigmoid is None else "sigmoid",
    )
    if options.sigmoid is not None:
        model.head.logit_bias.assign(options.sigmoid)
    return model


def result_of(folder, seed, train, test, options):
    """Trains a model, and measures its recall and the minutes of each stage."""
    model = model_of(options, seed)
    with Clock() as clock:
        history = kcm.fine_tune(
            model,
            train,
            options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            folder=folder,
            verbose=2,
        )
    recall = kcm.evaluation.evaluate_retrieval(model, test, verbose=0)
    model.save(folder / "model.keras")
    return {
        "seed": seed,
        "commit": runs.commit(),
        "processor": machine()["processor"],
        "threads": options.threads,
        "dtype": options.dtype,
        "recall": {
            **{k: 100 * v for k, v in recall.items() if k != "chance"},
            "mean recall@10": 50
            * (recall["image_to_text_recall@10"] + recall["text_to_image_recall@10"]),
        },
        "minutes": clock.minutes(),
        "history": history.history,
    }


class Clock:
    """Prints what a program prints, and notes when each of its stages begins."""

    def __enter__(self):
        self.stdout, sys.stdout, self.starts = sys.stdout, self, {}
        return self

    def __exit__(self, *_):
        sys.stdout = self.stdout
        self.starts["end"] = time.perf_counter(), time.process_time()

    def write(self, text):
        for stage in STAGES:
            if text.lower().startswith(stage):
                now = time.perf_counter(), time.process_time()
                self.starts.setdefault(stage, now)
        return self.stdout.write(text)

    def __getattr__(self, name):
        return getattr(self.stdout, name)

    def minutes(self):
        """By stage, the minutes on the clock and of the processor."""
        times = [*self.starts.items()]
        return {
            stage: [round((b - a) / 60, 2) for a, b in zip(start, end)]
            for (stage, start), (_, end) in itertools.pairwise(times)
        }


if __name__ == "__main__":
    main()
