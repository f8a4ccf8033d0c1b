"""The models of `quality.py`, and the stages that they are trained in."""

import json
from pathlib import Path

import keras
from quality_methods import has_threshold

import keras_cluster_mask as kcm

# A run has so many parts; after each the model is scored and saved.
PARTS = 8


def stages_of(method):
    """How many of the parts of a run each stage takes."""
    if method.ends_differently:
        return {"masked": PARTS - 1, "whole": 1}
    return {"masked": PARTS}


def new_model(method, options, data, seed, steps):
    """A model with fresh weights, compiled; equal seeds give equal weights."""
    keras.utils.set_random_seed(seed)
    backbone = kcm.models.clip_backbone(
        options.size,
        image_size=data.image_size,
        vocabulary_size=data.tokenizer.vocabulary_size,
        context_length=options.context_length,
        patch_size=options.patch_size,
    )
    if options.start_from:
        backbone.load_weights(Path(options.start_from) / "backbone.weights.h5")
    masking = method.new_masking(options.patch_size)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    if has_threshold(masking):
        masking.adapt(data.evaluation("train", 20), model=model)
    model.compile(
        kcm.small_data_optimizer(PARTS, steps // PARTS, options.learning_rate)
    )
    return model


def use_whole_images(model):
    """Trains on whole images from the next step on, with the same optimizer."""
    model.masking.mask_ratio = 0.0


def start_of(options):
    """The setting of the run whose weights are fine-tuned."""
    path = Path(options.start_from) / "result.json"
    setting = json.loads(path.read_text())["setting"]
    # What the tokenizer and the shapes of the weights follow from.
    names = ("data", "caption_key", "vocabulary_size", "context_length")
    names += ("size", "image_size", "patch_size")
    of_mine = vars(options) | {"data": Path(options.data).resolve().name}
    differ = [name for name in names if setting[name] != of_mine[name]]
    if differ:
        raise ValueError(
            f"`--start-from` must be a run of the same {differ}. Received: "
            f"{[setting[name] for name in differ]} instead of "
            f"{[of_mine[name] for name in differ]}"
        )
    return setting
