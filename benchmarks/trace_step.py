"""Which functions of the package a user enters, by file.

    KERAS_BACKEND=torch python benchmarks/trace_step.py

What few files explain can be read and debugged. Five ways through the package are
traced, each with a small CLIP and random masking on one device: `from_backbone`; from
the call of `image_text_dataset` with a table to its first batch, with the threads that
read (`row`); `fit` on this dataset, from its call until the first step begins; a step,
which torch runs eagerly; and what a `Checkpoint` that is written and resumed enters
beyond a `fit` (`checkpoint`). Comprehensions are not counted.
"""

import collections
import contextlib
import os
import sys
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import reporting
from PIL import Image

import keras_cluster_mask as kcm

FOLDER = Path(kcm.__file__).parent
CAPTIONS = [f"a photo of thing {index}" for index in range(12)]


def main(arguments=None):
    parser = reporting.parser(__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    if keras.backend.backend() != "torch":
        raise SystemExit(
            "Steps are traced on torch, which runs them eagerly: set "
            f"KERAS_BACKEND=torch. Received: {keras.backend.backend()}"
        )
    rows, titles = [], []
    for name, calls in trace().items():
        by_file = collections.defaultdict(list)
        for (file, function, _), count in sorted(calls.items()):
            by_file[file].append(function if count == 1 else f"{function} ({count})")
        titles.append(f"{name} {len(by_file)} files and {len(calls)} functions")
        rows += [
            {"way": name, "file": file, "functions": len(found), "names": found}
            for file, found in by_file.items()
        ]
    title = f"Files and functions that are entered: {'; '.join(titles)}"
    rows = [{**row, "names": ", ".join(row["names"])} for row in rows]
    reporting.publish(options.results / "trace_step.json", title, rows)


def trace():
    """Counts the calls of each function in each way through the package.

    Returns:
        A dictionary of `Counter`s by `(file, name, line)` of the function.
    """
    tokenizer = kcm.data.CLIPTokenizer.train(CAPTIONS, 600)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size)
    masking = kcm.RandomMasking(0.5)
    with counted() as making:
        model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    model.tokenizer = tokenizer
    model.compile(keras.optimizers.AdamW(1e-3))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_table(folder)
        with counted() as reading:
            data = dataset(folder, model)
            next(iter(data))
        starting, steps = trace_steps(model, data)
        # Two epochs, so that all that an epoch calls is among them.
        with counted() as fitting:
            model.fit(data, epochs=2, verbose=0)
        with counted() as saving:
            callbacks = [kcm.callbacks.Checkpoint(folder)]
            for epochs in (1, 2):
                model.fit(
                    data,
                    epochs=epochs,
                    callbacks=callbacks,
                    resume_from=folder,
                    verbose=0,
                )
    return {
        "from_backbone": making,
        "row": reading,
        "fit": starting,
        "step": steps[1],
        "checkpoint": {k: n for k, n in saving.items() if k not in fitting},
    }


def trace_steps(model, data):
    """Counts calls from `fit` until the first step, and in each of two steps."""
    train_step, steps = model.train_step, []

    def traced(*data):
        sys.setprofile(None)
        steps.append(collections.Counter())
        with counted(steps[-1]):
            return train_step(*data)

    model.train_step = traced
    with counted() as starting:
        model.fit(data, steps_per_epoch=2, verbose=0)
    model.train_step = train_step
    return starting, steps


@contextlib.contextmanager
def counted(calls=None):
    """Counts calls, also those in threads that start within, until a profile ends."""
    calls = collections.Counter() if calls is None else calls

    def profile(frame, event, argument):
        code = frame.f_code
        is_function = not code.co_name.startswith("<") or code.co_name == "<lambda>"
        path = Path(code.co_filename)
        if event == "call" and is_function and path.is_relative_to(FOLDER):
            file = str(path.relative_to(FOLDER))
            calls[file, code.co_qualname, code.co_firstlineno] += 1

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def save_table(folder):
    """Saves a table of images and captions."""
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for index, caption in enumerate(CAPTIONS):
        pixels = rng.integers(0, 256, (40, 40, 3)).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(f"{index}.png,{caption}")
    (folder / "pairs.csv").write_text("\n".join(lines))


def dataset(folder, model):
    """The table as a dataset for training."""
    # With a seed of its own: the keys of an order are cached in the process.
    return kcm.data.image_text_dataset(
        folder / "pairs.csv", model, batch_size=4, seed=2405
    )


if __name__ == "__main__":
    main()
