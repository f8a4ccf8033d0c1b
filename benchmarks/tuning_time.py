"""Where the time of a step goes that tunes two pre-trained encoders, on torch.

    python benchmarks/tuning_time.py --data DIR

`--encoders` is the folder of `connect_encoders.py`. Each part is timed alone, in turn,
and so is the whole step. The last columns compare both encoders with a matrix product
of their largest sizes: what share of its arithmetic per second they reach.
"""

import functools
import statistics

import connect_encoders as runs  # Chooses torch.
import keras
import torch
from flops import flops_of_blocks
from reporting import publish
from timing import interleaved

# The dtype policy and whether torch's fused attention is on.
SETTINGS = ("float32", True), ("mixed_bfloat16", True), ("mixed_bfloat16", False)


def main():
    parsed = runs.common_arguments(__doc__)
    parsed.add_argument("--rounds", type=int, default=3)
    options = parsed.parse_args()
    rows = []
    for options.dtype, is_fused in SETTINGS:
        runs.prepare(options)
        torch.backends.cuda.enable_flash_sdp(is_fused)
        for run in options.runs:
            row = {"dtype": options.dtype, "fused attention": is_fused}
            rows.append(row | {"run": runs.words_of(run)} | row_of(run, options))
            print(rows[-1], flush=True)
    path = f"{options.results}/tuning_time.json"
    publish(path, "A step that tunes two encoders", rows, commit=runs.commit())


def row_of(run, options):
    """The median seconds of each part of a step, and the shares of arithmetic."""
    model = runs.model_to_tune(options, 0, run)
    model.compile(keras.optimizers.AdamW(1e-9))
    batches = iter(runs.dataset(options, "train", model, run))
    batch = model.text_tower.lengths.cut_on_host(next(batches))
    texts = {k: v for k, v in batch.items() if k != "images"}
    sides = {
        "images": functools.partial(model.encode_image, batch["images"], True),
        "texts": functools.partial(model.encode_text, texts, True),
    }
    gradients = [torch.zeros_like(x.value) for x in model.trainable_variables]
    parts = {"data": functools.partial(next, batches)}
    for name, side in sides.items():
        parts[f"{name}, forward"] = side
        parts[f"{name}, both"] = functools.partial(backward, model, side)
    parts["optimizer"] = functools.partial(
        model.optimizer.apply, gradients, model.trainable_variables
    )
    parts["step"] = functools.partial(model.train_on_batch, batch)
    seconds = interleaved(parts, options.rounds)
    row = {name: statistics.median(x) for name, x in seconds.items()}
    for name, (flops, product) in arithmetic(model, run, texts, options).items():
        rate = flops / row[f"{name}, both"]
        row[f"{name}, share of a product"] = rate / rate_of(*product, options)
    return row


def backward(model, side):
    """Computes the embeddings of a side, and the gradients of its weights."""
    model.zero_grad()
    side().sum().backward()


def arithmetic(model, run, texts, options):
    """By side, the operations of a step and the sizes of its largest product."""
    image, text = runs.encoders(options.encoders, options.image_size)
    patches = (options.image_size // image.patch_size) ** 2
    kept = model.maskings[0].num_kept(patches) if model.maskings else patches
    sizes = {
        "images": (1 + kept, image.hidden_dim, image.num_layers),
        "texts": (
            texts["token_ids"].shape[1],
            text.backbone.hidden_dim,
            text.backbone.num_layers,
        ),
    }
    return {
        # Forward, and backward to inputs and weights.
        name: (3 * run.batch * flops_of_blocks(*size), (run.batch * size[0], size[1]))
        for name, size in sizes.items()
    }


def rate_of(rows, width, options):
    """The operations a second of a matrix product of the first layer of an MLP."""
    dtype = torch.bfloat16 if "bfloat16" in options.dtype else torch.float32
    one, other = torch.ones(rows, width, dtype=dtype), torch.ones(width, 4 * width)
    product = functools.partial(torch.matmul, one, other.to(dtype))
    (seconds,) = interleaved({"product": product}, 5, repeats=20).values()
    return 2 * rows * width * 4 * width / statistics.median(seconds)


if __name__ == "__main__":
    main()
