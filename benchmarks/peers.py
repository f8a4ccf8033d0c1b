"""The same two encoders in transformers and open_clip: recall for a time of one core.

    cd benchmarks
    python peers.py --encoders FOLDER --data DIR --costs
    python peers.py --encoders FOLDER --data DIR --runs "transformers rate=1e-4"
    python peers.py --encoders FOLDER --data DIR --runs "open_clip minutes=100" --test

`--encoders` is a folder with Hugging Face folders of DINOv2 and MiniLM, and `--data` a
folder of shards, as in `fine_tune.py`. transformers trains a
`VisionTextDualEncoderModel` with its `Trainer` and the settings of its example
`run_clip.py`. open_clip runs `open_clip_train.main`. A run is described by words: the
library, and settings that differ from those of `Peer`. Its number of steps follows from
the processor time of a step, which `--costs` measures on a quiet machine.
"""

import csv
import dataclasses
import functools
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import connect_encoders as runs
import fine_tune
import numpy as np
import torch
from PIL import Image
from reporting import machine, parser, publish, write_json
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms import v2

import keras_cluster_mask as kcm

BATCH_SIZE = 64
PROJECTION_DIM = 512
# The pixels that DINOv2 was trained on.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A run of one of the libraries.

    Attributes:
        library: `transformers` or `open_clip`.
        rate: The learning rate.
        minutes: The processor time to train for.
        tokens: The length that captions are padded to, or 0 for that of the longest
            caption in the batch. open_clip pads to one length in any case.
        drop: The fraction of patches that open_clip leaves out.
        warmup: The part of the steps in which the rate rises.
    """

    library: str
    rate: float = 5e-5
    minutes: float = 20
    tokens: int = 0
    drop: float = 0.5
    warmup: float = 0


def arguments():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add(
        "--encoders",
        default=os.environ.get("KERAS_CLUSTER_MASK_ENCODERS"),
        help="folder of encoders, or KERAS_CLUSTER_MASK_ENCODERS",
    )
    add("--data", required=True, help="folder of WebDataset shards by split")
    add("--caption-key", default="json.captions", help="field of captions")
    add("--results", default="results/peers", help="folder of runs and tables")
    add(
        "--runs",
        nargs="*",
        type=functools.partial(runs.run_of, Peer, known=("transformers", "open_clip")),
        default=[Peer("transformers"), Peer("open_clip", tokens=40)],
        help="transformers or open_clip, then settings of `Peer`",
    )
    add("--seed", type=int, default=1)
    add("--image-size", type=int, default=168, help="side in pixels")
    add("--dtype", default="mixed_bfloat16", choices=("mixed_bfloat16", "float32"))
    add("--threads", type=int, default=1)
    add("--costs", action="store_true", help="time the steps of the runs, and stop")
    add("--test", action="store_true", help="score on the test split")
    return parsed.parse_args()


def main():
    options = arguments()
    runs.prepare(options)
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    costs = folder / "costs.json"
    seconds = json.loads(costs.read_text())["seconds"] if costs.exists() else {}
    for run in options.runs:
        if options.costs:
            seconds[cost_name(run)] = seconds_of_step(run, options)
            write_json(costs, machine=machine(), seconds=seconds)
        else:
            train_one(run, round(60 * run.minutes / seconds[cost_name(run)]), options)
    report(folder, seconds)


def cost_name(run):
    """What the time of a step depends on."""
    return runs.words_of(Peer(run.library, tokens=run.tokens, drop=run.drop))


def seconds_of_step(run, options):
    """The median processor time of a step, without the first ones."""
    with StepTimes() as times:
        trained(run, 12, options)
    return float(np.median(np.diff(times.seconds[2:])))


def train_one(run, steps, options):
    folder = Path(options.results)
    name = f"{runs.words_of(run)}-{options.seed}".replace(" ", "_")
    path, weights = folder / f"{name}.json", folder / f"{name}.pt"
    result = json.loads(path.read_text()) if path.exists() else {}
    if weights.exists():
        model = new_model(run, options)
        model.load_state_dict(torch.load(weights))
    else:
        with StepTimes() as times:
            model = trained(run, steps, options)
        torch.save(model.state_dict(), weights)
        result = {
            "run": dataclasses.asdict(run),
            "seed": options.seed,
            "steps": steps,
            "commit": runs.commit(),
            "processor": machine()["processor"],
            "processor minutes": (times.seconds[-1] - times.seconds[0]) / 60,
        }
    for split in ["validation"] + ["test"] * options.test:
        if split not in result:
            result[split] = scores_of(run, model, split, options)
            write_json(path, **result)
            print(name, split, result[split], flush=True)
    gc.collect()


class StepTimes:
    """Notes the processor time after each step of any optimizer of torch."""

    def __enter__(self):
        self.seconds = [time.process_time()]
        self.hook = register_optimizer_step_post_hook(
            lambda *_: self.seconds.append(time.process_time())
        )
        return self

    def __exit__(self, *_):
        self.hook.remove()


def report(folder, seconds):
    """Prints and writes a row for each run."""
    rows, found = [], {}
    for path in sorted(folder.glob("*-[0-9].json")):
        found[path.stem] = run = json.loads(path.read_text())
        setting = run["run"]
        cost = seconds.get(cost_name(Peer(**setting)), float("nan"))
        row = {"run": path.stem, "minutes": round(run["steps"] * cost / 60, 1)}
        row |= {"steps": run["steps"], "seconds of a step": round(cost, 2)}
        for split in ("validation", "test"):
            for score, value in run.get(split, {}).items():
                row[f"{split}, {score}"] = round(value, 1)
        rows.append(row)
    publish(folder / "peers.json", "peers", rows, runs=found, seconds=seconds)


# === Models, with the same weights of encoders ===


def new_model(run, options):
    make = {"transformers": dual_encoder, "open_clip": open_clip_model}[run.library]
    torch.manual_seed(options.seed)
    return make(options)


def dual_encoder(options):
    """The model of transformers' `run_clip.py`, with new projections."""
    import transformers

    return transformers.VisionTextDualEncoderModel.from_vision_text_pretrained(
        f"{options.encoders}/dinov2_small",
        f"{options.encoders}/all_minilm_l6_v2",
        projection_dim=PROJECTION_DIM,
    )


def open_clip_model(options):
    """A model of open_clip, of timm's DINOv2 and a text encoder of Hugging Face."""
    import open_clip

    model = open_clip.create_model(open_clip_config(options))
    images = load_file(f"{options.encoders}/dinov2_small/model.safetensors")
    model.visual.trunk.load_state_dict(timm_weights(images, options.image_size))
    return model


def open_clip_config(options):
    """Writes the configuration of the model for open_clip, and returns its name."""
    import open_clip
    import timm

    # open_clip passes no image size to timm.
    name = f"dinov2_small_{options.image_size}"
    if not timm.is_model(name):

        def entrypoint(pretrained=False, **options_of_timm):
            return timm.create_model(
                "vit_small_patch14_dinov2",
                img_size=options.image_size,
                **options_of_timm,
            )

        entrypoint.__name__ = name
        entrypoint.__module__ = "timm.models.vision_transformer"
        timm.models.register_model(entrypoint)
    text = f"{options.encoders}/all_minilm_l6_v2"
    config = {
        "embed_dim": PROJECTION_DIM,
        "vision_cfg": {
            "timm_model_name": name,
            "timm_pool": "token",
            "image_size": options.image_size,
        },
        "text_cfg": {
            "hf_model_name": text,
            "hf_tokenizer_name": text,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
            "context_length": 40,
        },
    }
    path = Path(options.results, "model_configs", f"{name}.json")
    write_json(path, **config)
    open_clip.add_model_config(path.parent)
    return name


def timm_weights(weights, image_size):
    """The weights of DINOv2 in transformers, with the names and shapes of timm."""
    from timm.layers import resample_abs_pos_embed

    weights = {name.removeprefix("encoder."): x for name, x in weights.items()}
    positions = weights["embeddings.position_embeddings"]
    found = {
        "cls_token": weights["embeddings.cls_token"],
        "pos_embed": resample_abs_pos_embed(positions, [image_size // 14] * 2),
    }
    renamed = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    }
    for block in range(12):
        of_timm, own = f"blocks.{block}", f"layer.{block}"
        renamed |= {
            f"{own}.attention.output.dense": f"{of_timm}.attn.proj",
            **{f"{own}.norm{i}": f"{of_timm}.norm{i}" for i in (1, 2)},
            **{f"{own}.mlp.fc{i}": f"{of_timm}.mlp.fc{i}" for i in (1, 2)},
        }
        for kind in ("weight", "bias"):
            parts = [
                weights[f"{own}.attention.attention.{part}.{kind}"]
                for part in ("query", "key", "value")
            ]
            found[f"{of_timm}.attn.qkv.{kind}"] = torch.cat(parts)
        for i in (1, 2):
            scale = weights[f"{own}.layer_scale{i}.lambda1"]
            found[f"{of_timm}.ls{i}.gamma"] = scale
    for before, after in renamed.items():
        for kind in ("weight", "bias"):
            found[f"{after}.{kind}"] = weights[f"{before}.{kind}"]
    return found


# === Training, as each library does it ===


def trained(run, steps, options):
    """Trains a model for some steps, and returns it."""
    train = {"transformers": with_trainer, "open_clip": with_main}[run.library]
    with tempfile.TemporaryDirectory() as folder:
        return train(run, steps, Path(folder), options)


def with_trainer(run, steps, folder, options):
    """Trains as `examples/pytorch/contrastive-image-text/run_clip.py` does."""
    import transformers

    bfloat16 = options.dtype == "mixed_bfloat16"
    settings = transformers.TrainingArguments(
        folder,
        learning_rate=run.rate,
        warmup_steps=round(run.warmup * steps),
        weight_decay=0.1,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        bf16=bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        # In transformers 5.24, `Trainer` resumes without the attention of DINOv2, whose
        # weights have other names in its checkpoints.
        save_strategy="no",
        logging_steps=20,
        report_to="none",
        disable_tqdm=True,
    )
    model = new_model(run, options)
    trainer = transformers.Trainer(
        model,
        settings,
        train_dataset=Pairs(options),
        data_collator=functools.partial(collated, tokenize=tokenizer(run, options)),
    )
    trainer.train()
    return model


class Pairs(torch.utils.data.Dataset):
    """A row for each caption, with the photograph as `run_clip.py` prepares it."""

    def __init__(self, options):
        table = fine_tune.table_of(options, "train")
        with open(table, newline="") as file:
            rows = csv.DictReader(file)
            self.rows = [(table.parent / x["file_name"], x["caption"]) for x in rows]
        self.transform = transform_of_images(options)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        path, caption = self.rows[index]
        image = read_image(str(path), mode=ImageReadMode.RGB)
        return self.transform(image), caption


def transform_of_images(options):
    return v2.Compose(
        [
            v2.Resize([options.image_size], v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(options.image_size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def tokenizer(run, options):
    """A function from captions to padded tokens and their mask."""
    import transformers

    found = transformers.AutoTokenizer.from_pretrained(
        f"{options.encoders}/all_minilm_l6_v2"
    )
    padding = {"padding": "max_length"} if run.tokens else {"padding": True}
    return functools.partial(
        found,
        truncation=True,
        max_length=run.tokens or 128,
        return_tensors="pt",
        **padding,
    )


def collated(pairs, tokenize):
    images, captions = zip(*pairs, strict=True)
    texts = tokenize(list(captions))
    return {
        "pixel_values": torch.stack(images),
        "input_ids": texts["input_ids"],
        "attention_mask": texts["attention_mask"],
        "return_loss": True,
    }


def with_main(run, steps, folder, options):
    """Trains with `open_clip_train.main`, for one epoch of a table of `steps`."""
    import open_clip_train.main

    model = new_model(run, options)
    torch.save(model.state_dict(), folder / "initial.pt")
    table = folder / "pairs.csv"
    write_pairs(table, steps * BATCH_SIZE, options)
    numbers = {
        "train-data": table,
        "csv-separator": ",",
        "model": open_clip_config(options),
        "pretrained": folder / "initial.pt",
        "precision": "amp_bf16" if options.dtype == "mixed_bfloat16" else "fp32",
        "batch-size": BATCH_SIZE,
        "epochs": 1,
        "lr": run.rate,
        "wd": 0.1,
        "warmup": round(run.warmup * steps),
        "grad-clip-norm": 1.0,
        "workers": 0,
        "seed": options.seed,
        "logs": folder,
        "name": "run",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    words = [x for name, value in numbers.items() for x in (f"--{name}", str(value))]
    words += ["--image-mean", *map(str, MEAN), "--image-std", *map(str, STD)]
    words += ["--force-patch-dropout", str(run.drop)] * bool(run.drop)
    # It would change the loggers of all packages.
    with mock.patch.object(open_clip_train.main, "setup_logging"):
        open_clip_train.main.main(words)
    (saved,) = folder.glob("run/checkpoints/epoch_1.pt")
    weights = torch.load(saved, weights_only=False)["state_dict"]
    model.load_state_dict(weights)
    return model


def write_pairs(path, count, options):
    """Writes a table of `count` pairs of whole shuffled epochs, as open_clip reads."""
    random = np.random.default_rng(options.seed)
    pairs = Pairs(options).rows
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filepath", "title"))
        while count:
            order = random.permutation(len(pairs))[:count]
            writer.writerows((pairs[i][0], pairs[i][1]) for i in order)
            count -= len(order)


# === Scores ===


def scores_of(run, model, split, options):
    """Recall in percent, of the photographs and captions of a split."""
    table = fine_tune.table_of(options, split)
    captions = {}
    with open(table, newline="") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["file_name"], []).append(row["caption"])
    images, texts = embedded(
        run, model, [table.parent / name for name in captions], captions, options
    )
    owners = np.repeat(np.arange(len(captions)), [*map(len, captions.values())])
    found = kcm.evaluation.retrieval_recall(images, texts, owners)
    found = {k: 100 * v for k, v in found.items() if k != "chance"}
    both = ("image_to_text_recall@10", "text_to_image_recall@10")
    return found | {"mean recall@10": sum(found[x] for x in both) / 2}


@torch.inference_mode()
def embedded(run, model, paths, captions, options):
    """The embeddings of all photographs and of all captions."""
    model.eval()
    texts = [text for own in captions.values() for text in own]
    if run.library == "transformers":
        transform, tokenize = transform_of_images(options), tokenizer(run, options)

        def of_images(chosen):
            pixels = [transform(read_image(str(x), ImageReadMode.RGB)) for x in chosen]
            return model.get_image_features(torch.stack(pixels)).pooler_output

        def of_texts(chosen):
            return model.get_text_features(**tokenize(chosen)).pooler_output

    else:
        import open_clip

        size = options.image_size
        transform = open_clip.image_transform(size, False, mean=MEAN, std=STD)
        tokenize = open_clip.get_tokenizer(open_clip_config(options))

        def of_images(chosen):
            pixels = [transform(Image.open(x)) for x in chosen]
            return model.encode_image(torch.stack(pixels))

        def of_texts(chosen):
            return model.encode_text(tokenize(chosen))

    return batched(of_images, paths), batched(of_texts, texts)


def batched(function, items):
    parts = (function(items[i : i + 50]) for i in range(0, len(items), 50))
    return np.concatenate([part.float().cpu().numpy() for part in parts])


if __name__ == "__main__":
    main()
