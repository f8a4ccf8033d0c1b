"""Trains CLIP on shards, on one or several devices, with any backend.

KERAS_BACKEND=torch torchrun --nproc-per-node=8 train.py --train "shards/train-*.tar"

`--help` lists the options. To resume an interrupted run, run the same command again.
"""

import argparse
import contextlib
import functools
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", "tensorflow"
# Keras is imported at the end: the processes that `--num-workers` starts import this
# file, but do not need Keras.


def parse():
    parser = argparse.ArgumentParser(
        description="Trains CLIP on shards, on one device or on many.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train", default="shards/train-*.tar", help="shards")
    add("--validation", help="shards to measure the recall on")
    add("--classes", type=Path, help="a folder of images by class, for zero-shot")
    add("--results", type=Path, default="results", help="a folder, also to resume from")
    add("--tokenizer", help="its file; else CLIP's own, from open_clip")
    add("--model", default="vit_b_16", help="a size of kcm.models.clip_backbone")
    add("--image-size", type=int, default=224, help="in pixels")
    maskings = ("random", "cluster", "threshold", "embedding", "none")
    add("--masking", choices=maskings, default="random", help="half of the patches")
    add("--epochs", type=int, default=32, help="passes over the pairs")
    add("--whole-epochs", type=int, default=0, help="further ones on whole images")
    add("--batch-size", type=int, default=4096, help="of all devices together")
    add("--micro-batch-size", type=int, help="pairs in memory; else the batch")
    add("--learning-rate", type=float, default=5e-4, help="after the warm-up")
    add("--num-workers", type=int, default=0, help="that decode, for each process")
    return parser.parse_args()


def devices():
    """Joins the processes of the run, and returns the scope of its devices."""
    if {"WORLD_SIZE", "KERAS_DISTRIBUTION_NUM_PROCESSES"} & os.environ.keys():
        kcm.distribution.initialize()
    if keras.backend.backend() == "jax":
        return keras.distribution.DataParallel(auto_shard_dataset=False).scope()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if len(tf.config.list_physical_devices("GPU")) > 1:
            return tf.distribute.MirroredStrategy().scope()
    return contextlib.nullcontext()


def read(source, model, **options):
    """Returns evaluation data, with all samples in every process."""
    return kcm.data.image_text_dataset(
        source, model, training=False, process=(0, 1), **options
    )


def make_masking(name, steps=1):
    cluster = functools.partial(kcm.ClusterMasking, mask_ratio=0.5, seed=1)
    zero_to_one = keras.optimizers.schedules.PolynomialDecay(0.0, steps, 1.0)
    return {
        "random": lambda: kcm.RandomMasking(0.5, seed=1),
        "cluster": cluster,
        "threshold": lambda: cluster(min_mask_ratio=0.3),
        "embedding": lambda: cluster(min_mask_ratio=0.3, embedding_weight=zero_to_one),
        "none": lambda: None,
    }[name]()


def make_model(args, tokenizer, masking):
    backbone = kcm.models.clip_backbone(
        args.model,
        args.image_size,
        tokenizer.vocabulary_size,
        tokenizer.context_length,
    )
    return kcm.ContrastiveModel.from_backbone(
        backbone,
        masking=masking,
        micro_batch_size=args.micro_batch_size,
        tokenizer=tokenizer,
    )


def steps_of(train):
    """Returns the parts of a pass, and the steps of each part, about 1,000."""
    parts = 1 + len(train) // 1000
    return parts, len(train) // parts


def compile_model(model, train, args):
    """Compiles with one optimizer and learning rate schedule for both stages."""
    parts, steps = steps_of(train)
    steps *= parts * (args.epochs + args.whole_epochs)
    warmup = max(1, min(2000, steps // 10))
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(1, steps - warmup),
        warmup_target=args.learning_rate,
        warmup_steps=warmup,
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.2, beta_2=0.98, epsilon=1e-6)
    )


def fit(model, train, args, stage, first_epoch, last_epoch):
    """Trains a stage. Each epoch of `fit` is a part of a pass, and is saved."""
    parts, steps = steps_of(train)
    callbacks = []
    if args.validation:
        held_out = read(args.validation, model)
        callbacks.append(kcm.callbacks.Retrieval(held_out))
    if args.classes:
        names = sorted(path.name for path in args.classes.iterdir())
        labels = dict(label_key="folder", class_names=names)
        images = read(args.classes, model, **labels)
        callbacks.append(kcm.callbacks.ZeroShot(images, names))
    return model.fit(
        train,
        initial_epoch=first_epoch * parts,
        epochs=last_epoch * parts,
        steps_per_epoch=steps,
        resume_from=args.results / stage,
        callbacks=[*callbacks, kcm.callbacks.Checkpoint(args.results / stage)],
        verbose=2,
    )


def main(args):
    scope = devices()
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy("mixed_bfloat16")
    if args.tokenizer:
        tokenizer = kcm.data.CLIPTokenizer.from_file(args.tokenizer)
    else:
        tokenizer = kcm.data.CLIPTokenizer.from_open_clip()
    train = kcm.data.image_text_dataset(
        args.train,
        tokenizer,
        args.image_size,
        args.batch_size,
        training=True,
        crop_scale=(0.9, 1.0),
        num_workers=args.num_workers,
        seed=1,
    )
    with scope:
        masking = make_masking(args.masking, args.epochs * len(train))
        model = make_model(args, tokenizer, masking)
        if args.masking in ("threshold", "embedding"):
            model.masking.adapt(read(args.train, model), model=model)
        compile_model(model, train, args)
        history = fit(model, train, args, "main", 0, args.epochs)
        if args.whole_epochs:
            if model.masking is not None:
                model.masking.mask_ratio = 0.0
            end = args.epochs + args.whole_epochs
            history = fit(model, train, args, "whole", args.epochs, end)
    if kcm.distribution.is_main_process():
        model.save(args.results / "model.keras")
        for name, values in history.history.items():
            print(f"{name:35} {values[-1]:.4f}")


if __name__ == "__main__":
    arguments = parse()
    import keras

    import keras_cluster_mask as kcm

    main(arguments)
