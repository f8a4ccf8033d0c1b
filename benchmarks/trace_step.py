"""Which functions of the package one training step enters, by file.

    KERAS_BACKEND=torch python benchmarks/trace_step.py

A step that few files explain can be read and debugged. The second step of a small CLIP
with random masking on one device is traced, on torch, which runs a step eagerly.
Comprehensions and lambdas are not counted.
"""

import collections
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import reporting

import keras_cluster_mask as kcm

FOLDER = Path(kcm.__file__).parent


def main(arguments=None):
    parser = reporting.parser(__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    calls = trace_step()
    by_file = collections.defaultdict(list)
    for (file, function), count in sorted(calls.items()):
        by_file[file].append(function if count == 1 else f"{function} ({count} times)")
    rows = [
        {"file": file, "functions": len(names), "names": ", ".join(names)}
        for file, names in by_file.items()
    ]
    title = (
        f"A training step enters {len(by_file)} files and {len(calls)} functions, in "
        f"{sum(calls.values())} calls"
    )
    reporting.publish(options.results / "trace_step.json", title, rows)


def trace_step():
    """Counts the calls of each function in the second step of a `fit`.

    Returns:
        A `Counter` by `(file, name)` of the function.
    """
    if keras.backend.backend() != "torch":
        raise SystemExit(
            "Steps are traced on torch, which runs them eagerly: set "
            f"KERAS_BACKEND=torch. Received: {keras.backend.backend()}"
        )
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    masking = kcm.RandomMasking(0.5)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    model.compile(keras.optimizers.AdamW(1e-3))
    rng = np.random.default_rng(0)
    pairs = {
        "images": rng.integers(0, 256, (12, 32, 32, 3)).astype("uint8"),
        "token_ids": rng.integers(1, 100, (12, 12)).astype("int32"),
    }
    calls, train_step, steps = collections.Counter(), model.train_step, []

    def profile(frame, event, argument):
        code = frame.f_code
        is_ours = Path(code.co_filename).is_relative_to(FOLDER)
        if event == "call" and is_ours and not code.co_name.startswith("<"):
            file = Path(code.co_filename).relative_to(FOLDER)
            calls[str(file), code.co_qualname] += 1

    def traced(*data):
        steps.append(data)
        if len(steps) != 2:
            return train_step(*data)
        sys.setprofile(profile)
        try:
            return train_step(*data)
        finally:
            sys.setprofile(None)

    model.train_step = traced
    model.fit(pairs, batch_size=4, verbose=0)
    return calls


if __name__ == "__main__":
    main()
