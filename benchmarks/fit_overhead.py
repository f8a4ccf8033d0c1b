"""What `fit` and its callbacks add to the time of a JAX step.

    python benchmarks/fit_overhead.py

A tiny model, whose steps take milliseconds, is trained for an epoch without callbacks
and with each; the same steps also run in a plain loop. Time starts with the epoch and
ends when all its steps are done, before the checkpoint of its end is saved.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import statistics
import tempfile
import time

import jax
import keras
import numpy as np
from clip_steps import batch
from reporting import parser, publish
from timing import ratio

import keras_cluster_mask as kcm
from keras_cluster_mask.training.arrays import ArrayBatches

SIDE, VOCABULARY_SIZE, CONTEXT_LENGTH = 32, 100, 16


class Timer(keras.callbacks.Callback):
    """The seconds of an epoch, at whose end Keras has waited for its metrics."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.start


class Look(keras.callbacks.Callback):
    """Wants to know of each step, so Keras waits for each."""

    def on_train_batch_end(self, batch, logs=None):
        pass


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--batch-size", type=int, default=8)
    add("--steps", type=int, default=300)
    add("--rounds", type=int, default=9)
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    model = kcm.ContrastiveModel.from_backbone(
        kcm.models.clip_backbone("tiny", SIDE, VOCABULARY_SIZE, CONTEXT_LENGTH),
        kcm.RandomMasking(0.5),
    )
    model.compile(keras.optimizers.AdamW(1e-4))
    pairs = batch(options.batch_size * options.steps, SIDE)
    pairs["token_ids"] = pairs["token_ids"][:, :CONTEXT_LENGTH] % VOCABULARY_SIZE
    pairs["token_ids"][:, -1] = VOCABULARY_SIZE - 1
    run = loop(model, pairs, options)
    methods = {
        "steps in a loop": run,
        "fit": lambda: fit(model, pairs, options),
        "fit, Throughput": lambda: fit(model, pairs, options, throughput()),
        "fit, Checkpoint": lambda: fit(model, pairs, options, checkpoint(options)),
        "fit, both": lambda: fit(
            model, pairs, options, throughput(), checkpoint(options)
        ),
        "fit, a callback that waits": lambda: fit(model, pairs, options, Look()),
    }
    for method in methods.values():
        method()
    seconds = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, method in methods.items():
            seconds[name].append(method() / options.steps)
    rows = [
        {
            "steps": name,
            "ms a step": f"{1000 * statistics.median(found):.3f}",
            "/ loop": f"{ratio(seconds, name, 'steps in a loop'):.3f}",
            "/ fit": f"{ratio(seconds, name, 'fit'):.3f}",
        }
        for name, found in seconds.items()
    ]
    title = f"{options.steps} steps of a tiny CLIP, batch {options.batch_size}, JAX"
    publish(
        f"{options.results}/fit_overhead.json",
        title,
        rows,
        options=vars(options),
        seconds=seconds,
    )


def throughput():
    return kcm.callbacks.Throughput()


def checkpoint(options):
    """Counts the steps of an epoch, and saves its end alone."""
    folder = tempfile.TemporaryDirectory()
    made = kcm.callbacks.Checkpoint(folder.name, save_every=10 * options.steps)
    # The folder is removed with the callback.
    made.folder = folder
    return made


def fit(model, pairs, options, *callbacks):
    """The seconds of an epoch."""
    timer = Timer()
    callbacks = [timer, *callbacks]
    model.fit(
        pairs,
        batch_size=options.batch_size,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    return timer.seconds


def loop(model, pairs, options):
    """A function that runs Keras's own step on the same batches, and only that."""
    fit(model, pairs, options)
    step = jax.jit(model.train_step, donate_argnums=0)
    batches = ArrayBatches(pairs, options.batch_size, shuffle=False)

    def run():
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        # Copies, as a step overwrites what it is given.
        state = tuple([jax.numpy.array(v.value) for v in group] for group in groups)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _, content in zip(range(options.steps), batches):
            logs, state = step(state, (content,))
        np.asarray(logs["loss"])
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    main()
