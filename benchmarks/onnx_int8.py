"""What ONNX and int8 weights change: size, time on one core, recall.

    pip install onnxruntime onnxscript
    taskset -c 0 python benchmarks/onnx_int8.py photos.keras --data DIR

Both towers of a saved model are exported, and quantized by onnxruntime: the weights of
matrix products, one scale for each column. Inputs are quantized while it runs. Recall
is of all images of a split and all of their captions.
"""

import functools
import os
import statistics
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from reporting import parser, publish
from timing import interleaved

import keras_cluster_mask as kcm

GROUP = 50
SIDES = ("image", "text")


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("model", help="a .keras file")
    add("--data", required=True, help="folder of WebDataset shards by split")
    add("--split", default="validation")
    add("--caption-key", default="json.captions", help="field of captions")
    add("--rounds", type=int, default=20, help="how often each is timed")
    add("--results", default="results", help="folder for models and the table")
    options = parsed.parse_args()
    torch.set_num_threads(1)
    folder = Path(options.results, "onnx")
    folder.mkdir(parents=True, exist_ok=True)
    model = keras.saving.load_model(options.model)
    batches, owners = batches_of(model, options)
    programs = {"Keras": keras_programs(model)}
    files = {
        kind: [folder / f"{side}-{kind}.onnx" for side in SIDES]
        for kind in ("float32", "int8")
    }
    for side, single, small in zip(SIDES, *files.values(), strict=True):
        getattr(model, f"{side}_tower").export(single, format="onnx", verbose=False)
        quantize_dynamic(
            single, small, op_types_to_quantize=["MatMul"], per_channel=True
        )
    programs |= {kind: [session(x) for x in paths] for kind, paths in files.items()}
    rows, expected = [], None
    for kind, both in programs.items():
        found = [
            np.concatenate([program(x) for x in given])
            for program, given in zip(both, batches, strict=True)
        ]
        expected = expected or found
        recall = kcm.evaluation.retrieval_recall(*found, owners, ks=10)
        row = {"program": kind}
        for side, mine, theirs in zip(SIDES, found, expected, strict=True):
            row[f"{side}, difference"] = f"{np.abs(mine - theirs).max():.1e}"
        for name in ("image_to_text", "text_to_image"):
            row[name.replace("_", " ")] = round(100 * recall[f"{name}_recall@10"], 2)
        for side, path in zip(SIDES, files.get(kind, ()), strict=False):
            row[f"{side}, MB"] = round(path.stat().st_size / 1e6, 1)
        rows.append(row)
    for side, number in (("image", 0), ("text", 1)):
        # One image; one text of the shortest group.
        given = keras.tree.map_structure(lambda x: x[:1], batches[number][-1])
        steps = {
            kind: functools.partial(both[number], given)
            for kind, both in programs.items()
        }
        seconds = interleaved(steps, options.rounds)
        for row in rows:
            found = statistics.median(seconds[row["program"]])
            row[f"{side}, ms"] = round(1000 * found, 2)
    title = f"{options.split} images and captions, recall@10 in percent"
    publish(Path(options.results) / "onnx_int8.json", title, rows)


def batches_of(model, options):
    """Batches of images and of texts, and the row of the image of each text."""
    data = kcm.data.image_text_dataset(
        f"{options.data}/{options.split}-*.tar",
        model,
        batch_size=GROUP,
        training=False,
        include_captions="all",
        caption_key=options.caption_key,
    )
    images, captions = [], []
    for batch in data:
        images.append(batch["images"])
        captions += batch["captions"].tolist()
    counts = [len(x) for x in captions]
    owners = np.repeat(np.arange(len(counts)), counts)
    tower = model.text_tower
    ids = model.tokenizer([text for texts in captions for text in texts])
    given = keras.tree.map_structure(lambda x: np.array(x, "int32"), tower.prepare(ids))
    given = given if isinstance(given, dict) else {"token_ids": given}
    # Texts of one length together, the shortest last.
    order = np.argsort(-tower.lengths.of(given), kind="stable")
    texts = [
        tower.lengths.cut({name: x[order[i : i + GROUP]] for name, x in given.items()})
        for i in range(0, len(order), GROUP)
    ]
    return ([{"images": x} for x in images], texts), owners[order]


def keras_programs(model):
    """Functions from named inputs to embeddings, by Keras."""

    def embed(tower, inputs):
        if len(inputs) == 1:
            (inputs,) = inputs.values()
        return tower.predict_on_batch(inputs)

    return [functools.partial(embed, getattr(model, f"{x}_tower")) for x in SIDES]


def session(path):
    """A function from named inputs to embeddings, by onnxruntime on one core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    program = onnxruntime.InferenceSession(path, options)
    return lambda inputs: program.run(None, inputs)[0]


if __name__ == "__main__":
    main()
