"""Recall of `kcm.fine_tune` against minutes, beside transformers and open_clip.

    cd benchmarks
    python scoreboard.py
    python scoreboard.py --record "what made it faster"

Reads the published results of `fine_tune.py`, `connect_encoders.py` and `peers.py` in
`results/`, and draws `docs/minutes.png`. Minutes are those on one core for everything
that follows the pre-trained encoders: features, projections and tuning. `--record` adds
a row to the table of records in `results/scoreboard.json`.
"""

import datetime
import json
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
from reporting import parser, table, write_json

FOLDER = Path(__file__).parent
HALF, WHOLE = "fine_tune, half of the patches", "fine_tune, whole images"
TRANSFORMERS, OPEN_CLIP = "transformers", "open_clip, half of the patches"
COLORS = {HALF: "C1", WHOLE: "C0", OPEN_CLIP: "C2", TRANSFORMERS: "C3"}
# Runs of `connect_encoders.py`, which tunes as `kcm.fine_tune` does.
TUNING = "rate=0.0001 depth=0.8"
TUNED = {
    f"random epochs=22.0 {TUNING}": HALF,
    f"none epochs=3.0 {TUNING}": WHOLE,
    f"none epochs=22.0 {TUNING}": WHOLE,
}
# Recall@10 both ways, among 1,215 other photographs of Flickr8k:
# https://github.com/ericjtyao05-cmd/CLIP-ViT-B-32-on-Flickr8k
ZERO_SHOT = fmean((94.57, 86.44))
# The recall, in percent, that a record is the time to.
GOALS = (69, 80)


def main():
    parsed = parser(__doc__)
    parsed.add_argument("--record", help="what made it faster")
    parsed.add_argument("--results", type=Path, default=FOLDER / "results")
    parsed.add_argument("--plot", type=Path, default=FOLDER.parent / "docs/minutes.png")
    options = parsed.parse_args()
    points = all_points(options.results)
    path = options.results / "scoreboard.json"
    records = json.loads(path.read_text())["rows"] if path.exists() else []
    if options.record:
        records.append(record(points, options.record))
    for rows in (points, records):
        print(table([{k: v for k, v in x.items() if k != "runs"} for x in rows]), "\n")
    write_json(path, title="Records", rows=records, points=points)
    draw(points, options.plot)


def all_points(results):
    """Minutes and recall on test photographs, with the runs that they are of."""

    def runs_of(file, start):
        runs = json.loads((results / file).read_text())["runs"]
        return [x for name, x in runs.items() if name.startswith(start) and "test" in x]

    where = "--encoders FOLDER --data DIR"
    path = results / "fine_tune.json"
    whole = "fine_tune-3-epochs-all-photographs-test"
    ours = [x for k, x in json.loads(path.read_text())["runs"].items() if whole in k]
    # Later seeds read the features of the first.
    features = ours[0]["minutes"]["features"][1]
    before = features + fmean(x["minutes"]["projections"][1] for x in ours)
    tuning = fmean(x["minutes"]["encoders"][1] for x in ours)
    for run in ours:
        run["test"] = {"mean": run["recall"]["mean recall@10"]}
    points = [point(HALF, before, tuning, ours, f"fine_tune.py {where}")]

    heads = runs_of("connect_encoders-projections.json", "head-mlp-")
    command = f"connect_encoders.py features heads --heads mlp --test {where}"
    points += [point(line, before, 0, heads, command) for line in (HALF, WHOLE)]

    file = "connect_encoders-224px.json"
    seconds = json.loads((results / file).read_text())["seconds of a step"]
    for words, line in TUNED.items():
        runs = runs_of(file, f"tune-{words}-equal_".replace(" ", "_"))
        tuning = runs[0]["steps"] * seconds[words.split()[0]] / 60
        command = f'connect_encoders.py tune --runs "{words}" --test {where}'
        points.append(point(line, before, tuning, runs, command))

    for name, line in (("transformers", TRANSFORMERS), ("open_clip", OPEN_CLIP)):
        for run in runs_of("peers.json", name):
            settings = "rate={rate} tokens={tokens} minutes={minutes}".format_map(
                run["run"]
            )
            command = f'peers.py --runs "{name} {settings}" --test {where}'
            run["test"]["mean"] = run["test"]["mean recall@10"]
            points.append(point(line, 0, run["run"]["minutes"], [run], command))
    return sorted(points, key=lambda x: (x["line"], x["minutes"]))


def point(line, before, tuning, runs, command):
    """A point of a line: some runs that differ in their seed."""
    recall = [run["test"]["mean"] for run in runs]
    return {
        "line": line,
        "minutes": round(before + tuning, 1),
        "after projections": round(tuning, 1),
        "recall@10": round(fmean(recall), 1),
        "deviation": round(stdev(recall), 1) if len(recall) > 1 else "",
        "command": command,
        "runs": [
            {"recall@10": each, "commit": x["commit"], "processor": x.get("processor")}
            for x, each in zip(runs, recall, strict=True)
        ],
    }


def record(points, what):
    """The fewest minutes of `kcm.fine_tune` to each goal."""
    row, runs = {"date": f"{datetime.date.today()}", "what": what}, {}
    for goal in GOALS:
        first = min(
            (x for x in points if x["line"] == HALF and x["recall@10"] >= goal),
            key=lambda x: x["minutes"],
        )
        row[f"minutes to {goal} %"] = first["minutes"]
        row[f"{goal} %, after projections"] = first["after projections"]
        runs[f"{goal} %"] = {k: first[k] for k in ("recall@10", "command", "runs")}
    return row | {"runs": runs}


def draw(points, path):
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for line, color in COLORS.items():
        own = [x for x in points if x["line"] == line]
        axes.errorbar(
            [x["minutes"] for x in own],
            [x["recall@10"] for x in own],
            [x["deviation"] or 0 for x in own],
            color=color,
            marker="o",
            capsize=3,
            label=line,
        )
    axes.axhline(ZERO_SHOT, color="gray", linestyle="dashed", linewidth=1)
    axes.annotate(
        "CLIP ViT-B/32, zero-shot (400 million pairs; 1,215 other photographs)",
        (0.01, ZERO_SHOT),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        va="top",
        color="gray",
        fontsize="small",
    )
    axes.set_xscale("log")
    ticks = (5, 10, 20, 50, 100)
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set_xlim(5, 120)
    axes.set_xlabel("minutes on one CPU core, everything counted")
    axes.set_ylabel("recall@10, test photographs (%)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.92))
    figure.savefig(path, dpi=180)
    plt.close(figure)


if __name__ == "__main__":
    main()
