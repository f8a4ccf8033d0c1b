"""Changes to the tuning of two encoders, each for the same processor time.

    cd benchmarks
    python connect_encoders.py features heads --data DIR --heads mlp
    python levers.py --data DIR --costs --runs "random captions=2" "random words=1"
    python levers.py --data DIR --runs random "random captions=2" "random whole=0.2"
    python levers.py --data DIR --steps 2080 --test --runs random none

A run starts from the projections of `connect_encoders.py heads`, and is described by
words: its masking, and settings that differ from those of `Lever`. It takes as long as
`--steps` steps with random masking (50 %) and the settings of `kcm.fine_tune`.
`--costs` compares the processor time of steps with that of one of these, on a quiet
machine. Settings are chosen by the validation split. An interrupted run resumes.
"""

import collections
import dataclasses
import functools
import gc
import itertools
import json
import time
from pathlib import Path

import connect_encoders as runs
import keras
import numpy as np
import torch
from keras import ops
from reporting import machine, mean_and_spread, publish, write_json
from timing import interleaved, ratio

import keras_cluster_mask as kcm
from keras_cluster_mask.data.tokenizing import tokenize
from keras_cluster_mask.training.optimizers import build

# A run is saved after this many steps.
SAVE_EVERY = 64


@dataclasses.dataclass(frozen=True)
class Lever(runs.Tuning):
    """A run in the settings of `kcm.fine_tune`, except for some.

    Attributes:
        whole: The part of the time, at the end, for steps on whole images.
        captions: The number of captions of each image in a step, all positives.
        words: The weight of a loss that predicts the words of the captions from the
            features of the image (SuperCLIP, arXiv 2512.14480).
        drop: The fraction of the features to drop before the projections.
        memory: The number of earlier steps whose embeddings are negatives (XBM, arXiv
            1912.06798).
        alike: The number of look-alike photographs that stay together in a batch.
        start: What the projections were trained on: empty for the features of all
            patches and captions, `caption` for those of one caption of each image,
            `half` for those of half of the patches, `half+caption` for both, `none`
            for new projections.
    """

    rate: float = 1e-4
    depth: float = 0.8
    whole: float = 0
    captions: int = 1
    words: float = 0
    drop: float = 0
    memory: int = 0
    alike: int = 0
    start: str = ""


BASE = Lever("random")


def arguments():
    parsed = runs.common_arguments(__doc__, Lever)
    add = parsed.add_argument
    add("--steps", type=int, default=288, help="the time, in steps of the base")
    add("--costs", action="store_true", help="time the steps of the runs, and stop")
    add("--test", action="store_true", help="score on the test split")
    parsed.set_defaults(results="results/levers")
    return parsed.parse_args()


def main():
    options = arguments()
    runs.prepare(options)
    folder = Path(options.results)
    if options.costs:
        measure_costs(options, folder)
    else:
        costs = json.loads((folder / "lever_costs.json").read_text())["costs"]
        for seed in options.seeds:
            for run in options.runs:
                run_one(run, seed, costs, options, folder)
    report(folder)


def run_one(run, seed, costs, options, folder):
    name = f"lever-{options.steps}-{runs.words_of(run)}-{seed}".replace(" ", "_")
    path, weights = folder / f"{name}.json", folder / f"{name}.weights.h5"
    result = json.loads(path.read_text()) if path.exists() else {}
    wanted = ["validation"] + ["test"] * options.test
    if {*wanted} <= result.keys():
        return
    gc.collect()
    model = new_model(run, seed, options, folder)
    if result:
        model.load_weights(weights)
    else:
        masked, whole = steps_of(run, costs, options.steps)
        start = time.process_time()
        losses = train(model, run, seed, masked, whole, options, folder / f"{name}.pt")
        model.save_weights(weights)
        result = {
            "run": dataclasses.asdict(run),
            "time in steps of the base": options.steps,
            "commit": runs.commit(),
            "processor": machine()["processor"],
            "dtype": options.dtype,
            "steps": masked + whole,
            "losses": losses,
            "processor minutes of this process": (time.process_time() - start) / 60,
        }
    for split in wanted:
        if split not in result:
            result[split] = runs.scores_of(model, options, split)
            write_json(path, **result)
            print(name, split, result[split], flush=True)


def new_model(run, seed, options, folder):
    """A model with the projections that were trained on features."""
    path = folder / f"head-{run.start or 'mlp'}-{seed}.npz"
    if run.start not in ("", "none") and not path.exists():
        runs.encoders.cache_clear()  # Those of the last run have been tuned.
        model = runs.new_model(options, seed)
        features = cheaper_features(model, run.start, options)
        size = min(512, features.num_images)
        runs.train_projections(model, features, batch_size=size)
        runs.save_projections(model, path)
    model = runs.model_to_tune(options, seed, run)
    return model if run.start == "none" else runs.with_head(model, path)


def cheaper_features(model, start, options):
    """Features of half of the patches, or of one caption of each image, or both."""
    whole = runs.features_of(options, "train", model)
    folder = Path(options.features, "train", start)
    if not folder.exists():
        folder.mkdir()
        names = "image_features", "text_features", "caption_labels", "num_captions"
        arrays = {x: np.load(whole.folder / f"{x}.npy") for x in names}
        header = json.loads((whole.folder / "features.json").read_text())
        if "half" in start:
            masked = runs.model_to_tune(options, 0, BASE)
            masked.image_encoder.trainable = False
            found = [
                masked.image_tower.features(batch["images"], training=True)
                for batch in runs.dataset(options, "train", masked)
            ]
            found = np.concatenate([ops.convert_to_numpy(x) for x in found])
            arrays["image_features"] = found.astype(arrays["image_features"].dtype)
        if "caption" in start:
            first = whole.first_text
            for name in ("text_features", "caption_labels"):
                arrays[name] = arrays[name][first]
            arrays["num_captions"] = np.ones_like(arrays["num_captions"])
            header["texts"] = header["images"]
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        write_json(folder / "features.json", **header)
    return kcm.TowerFeatures(folder)


def report(folder):
    """Prints and writes the mean and the spread over seeds of all finished runs."""
    groups, found = {}, {}
    for path in sorted(folder.glob("lever-*.json")):
        found[path.stem] = run = json.loads(path.read_text())
        groups.setdefault(path.stem.rpartition("-")[0], []).append(run)
    rows = []
    for name, mine in groups.items():
        row = {"run": name, "seeds": len(mine), "steps": mine[0]["steps"]}
        for split in ("validation", "test"):
            scored = [run[split] for run in mine if split in run]
            for score in scored[0] if scored else ():
                decimals = 3 if score == "loss" else 1
                values = [each[score] for each in scored]
                row[f"{split}, {score}"] = mean_and_spread(values, decimals)
        rows.append(row)
    costs = json.loads((folder / "lever_costs.json").read_text())
    publish(folder / "levers.json", "Levers", rows, runs=found, costs=costs)


# === Time ===


def cost_name(run):
    """What the time of a step depends on."""
    kept = ("ratio", "batch", "micro", "captions", "memory", "words", "drop")
    kept = {name: getattr(run, name) for name in kept}
    return runs.words_of(Lever(run.masking, **kept))


def measure_costs(options, folder):
    """Times a step of each run against one of the base, in turn."""
    path = folder / "lever_costs.json"
    costs = json.loads(path.read_text())["costs"] if path.exists() else {}
    steps = {}
    for run in dict.fromkeys((BASE, *options.runs)):
        runs.encoders.cache_clear()
        model = new_model(run, options.seeds[0], options, folder)
        step = Step(model, run, 1000, 0, options)
        batch = next(iter(batches_of(run, model, options, 1)))
        steps[cost_name(run)] = functools.partial(step, batch)
    found = interleaved(steps, rounds=5, clock=time.process_time)
    seconds = float(np.median(found[cost_name(BASE)]))
    costs |= {name: ratio(found, name, to=cost_name(BASE)) for name in found}
    facts = {"machine": machine(), "commit": runs.commit()}
    write_json(path, **facts, costs=costs, **{"seconds of the base": seconds})
    print(json.dumps(costs, indent=1))


def steps_of(run, costs, steps):
    """The numbers of steps on masked and on whole images, for the time of a run."""
    masked = (1 - run.whole) * steps / costs[cost_name(run)]
    none = dataclasses.replace(run, masking="none", ratio=BASE.ratio)
    whole = run.whole and run.whole * steps / costs[cost_name(none)]
    return round(masked), round(whole)


# === Training ===


def train(model, run, seed, masked, whole, options, path):
    """Trains a model; returns the mean loss of each part that was saved."""
    step = Step(model, run, masked + whole, seed, options)
    batches, losses, done = batches_of(run, model, options, seed), [], 0
    if path.exists():
        done, losses = step.load(path)
    batches.start = done
    part = []
    for batch in batches:
        if done == masked and whole:
            model.masking.mask_ratio = 0.0
        part.append(step(batch))
        done += 1
        if done % SAVE_EVERY == 0 or done == masked + whole:
            losses.append(float(np.mean(part)))
            part = []
            step.save(path, done, losses)
        if done == masked + whole:
            break
    path.unlink()
    return losses


def batches_of(run, model, options, seed):
    """Training batches, in which look-alike photographs are together if a run says."""
    source, more = f"{options.data}/train-*.tar", {}
    if run.alike:
        found = runs.features_of(options, "train", model)
        images, texts, rows = runs.embeddings_of(runs.projections_of(model), found)
        captions = np.zeros_like(images)
        np.add.at(captions, rows, texts)
        both = runs.normalized(images + runs.normalized(captions))
        order = groups_of_neighbors(both, run.alike, np.random.default_rng(seed))
        source, more = kcm.data.subset(source, order), {"block_size": run.alike}
    return kcm.data.image_text_dataset(
        source,
        model,
        batch_size=run.batch,
        caption_key=options.caption_key,
        crop_scale=(run.crop, 1.0),
        seed=seed,
        include_captions=True,
        include_keys=True,
        **more,
    )


def groups_of_neighbors(embeddings, size, random):
    """An order of rows in groups: random anchors, each with its nearest rows."""
    is_left, order = np.ones(len(embeddings), bool), []
    for anchor in random.permutation(len(embeddings)):
        if is_left[anchor]:
            near = np.where(is_left, embeddings @ embeddings[anchor], -np.inf)
            group = np.argsort(-near)[: min(size, is_left.sum())]
            is_left[group] = False
            order += group.tolist()
    return order


class Step:
    """A training step with the changes of a run, on torch."""

    def __init__(self, model, run, steps, seed, options):
        self.model, self.run = model, run
        runs.compile_for(model, run, steps)
        build(model)
        self.memory = collections.deque(maxlen=run.memory)
        self.random, self.words = np.random.default_rng(seed), None
        self.optimizers = [(model.optimizer, [*model.trainable_variables])]
        if run.words:
            self.words = Words(model, options)
            rate = keras.optimizers.schedules.CosineDecay(run.head * run.rate, steps)
            optimizer = keras.optimizers.AdamW(rate, weight_decay=run.decay)
            optimizer.build(self.words.dense.trainable_variables)
            self.optimizers += [(optimizer, self.words.dense.trainable_variables)]

    def __call__(self, batch):
        loss = self.loss(batch)
        loss.backward()
        with torch.no_grad():
            for optimizer, weights in self.optimizers:
                optimizer.apply([x.value.grad for x in weights], weights)
                for weight in weights:
                    weight.value.grad = None
        return float(loss.detach())

    def loss(self, batch):
        run, model, count = self.run, self.model, self.run.captions
        texts = {"token_ids": batch["token_ids"]}
        if count > 1:
            chosen = [
                self.random.permutation(len(x))[:count] for x in batch["captions"]
            ]
            texts = [
                own[numbers[i % len(numbers)]]
                for i in range(count)
                for own, numbers in zip(batch["captions"], chosen)
            ]
            texts = {"token_ids": tokenize(model.tokenizer, texts)}
        texts = model.text_tower.lengths.cut_on_host(texts)
        features = model.image_tower.features(batch["images"], training=True)
        loss = 0.0
        if self.words:
            loss = run.words * self.words.loss(features, batch["captions"])
        features_of_texts = model.text_tower.features(texts, training=True)
        if run.drop:
            features = keras.random.dropout(features, run.drop)
        images = model.image_tower.project(features, training=True)
        texts = model.text_tower.project(features_of_texts, training=True)
        _, keys = np.unique(batch["keys"].astype(str), return_inverse=True)
        images = ops.tile(images, (count, 1))
        if run.memory:
            return loss + self.loss_with_memory(images, texts, batch["keys"])
        return loss + kcm.losses.softmax_contrastive_loss(
            images, texts, model.head.scale, np.tile(keys, count)
        )

    def loss_with_memory(self, images, texts, keys):
        """The softmax loss, with the embeddings of earlier steps as negatives."""
        earlier = [*self.memory]
        every = np.concatenate([keys, *(x[2] for x in earlier)]).astype(str)
        mine = keys.astype(str)[:, None]
        is_same = torch.from_numpy(mine == every[None])
        # Other views of a photograph are neither positives nor negatives.
        hidden = is_same & ~torch.eye(*is_same.shape, dtype=torch.bool)
        losses = []
        for rows, others in ((images, texts), (texts, images)):
            which = 1 if others is texts else 0
            others = torch.cat([others, *(x[which] for x in earlier)])
            logits = self.model.head.scale * (rows @ others.T)
            logits = logits.masked_fill(hidden, -torch.inf)
            target = torch.arange(len(rows))
            losses.append(torch.nn.functional.cross_entropy(logits, target))
        self.memory.append((images.detach(), texts.detach(), keys))
        return sum(losses) / 2

    def save(self, path, done, losses):
        draft = path.with_suffix(".draft")
        values = [x.value for x in self.variables]
        torch.save({"values": values, "done": done, "losses": losses}, draft)
        draft.replace(path)

    def load(self, path):
        found = torch.load(path)
        for variable, value in zip(self.variables, found["values"], strict=True):
            variable.assign(value)
        return found["done"], found["losses"]

    @property
    def variables(self):
        words = self.words.dense.variables if self.words else []
        of_optimizers = (optimizer.variables for optimizer, _ in self.optimizers)
        return [*self.model.variables, *words, *itertools.chain(*of_optimizers)]


class Words:
    """A layer that predicts which words the captions of an image have.

    The target of an image is the share of each token of its captions, weighted by
    rarity.
    """

    def __init__(self, model, options):
        data = runs.dataset(options, "train", model)
        captions = [text for batch in data for own in batch["captions"] for text in own]
        self.tokens = {}
        for start in range(0, len(captions), 1024):
            texts = captions[start : start + 1024]
            rows = tokenize(model.tokenizer, texts).tolist()
            self.tokens |= {text: {*row} for text, row in zip(texts, rows)}
        counts = collections.Counter(x for text in captions for x in self.tokens[text])
        self.column = {token: i for i, token in enumerate(sorted(counts))}
        counts = np.array([counts[token] for token in self.column])
        self.rarity = np.log(len(captions) / (1 + counts)).clip(0)
        self.dense = keras.layers.Dense(len(counts), name="words")
        self.dense.build((None, model.image_tower.features_width))

    def loss(self, features, captions):
        targets = np.zeros((len(captions), len(self.column)), "float32")
        for row, own in zip(targets, captions):
            for token in set().union(*map(self.tokens.get, own)):
                row[self.column[token]] = self.rarity[self.column[token]]
        targets /= targets.sum(1, keepdims=True)
        logits = ops.cast(self.dense(features), "float32")
        shares = ops.convert_to_tensor(targets)
        return -ops.mean(ops.sum(shares * ops.log_softmax(logits), axis=1))


if __name__ == "__main__":
    main()
