"""The models of `quality.py`, and the stages that they are trained in."""

import json
from pathlib import Path

import keras
from quality_methods import has_threshold

import keras_cluster_mask as kcm
from keras_cluster_mask.models.sizes import SIZES, make_clip

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
    backbone = new_backbone(options, data)
    if options.start_from:
        backbone.load_weights(Path(options.start_from) / "backbone.weights.h5")
    masking = method.new_masking(options.patch_size, backbone.vision_encoder, steps)
    share = options.short_context / options.context_length
    token_masking = method.token_masking and method.token_masking(share)
    model = kcm.ContrastiveModel.from_backbone(
        backbone, masking, token_masking, views=method.views
    )
    if has_threshold(masking):
        masking.adapt(data.evaluation("train", 20))
    recipe = kcm.small_data_recipe(PARTS, steps // PARTS, options.learning_rate)
    model.compile(recipe.optimizer)
    return model


def new_backbone(options, data):
    """Two towers, of a size by name or of a width and a number of layers."""
    shape = {
        "image_size": data.image_size,
        "vocabulary_size": data.tokenizer.vocabulary_size,
        "context_length": options.context_length,
    }
    if options.size in SIZES:
        return kcm.models.clip_backbone(
            options.size, **shape, patch_size=options.patch_size
        )
    width, layers = map(int, options.size.split("x"))
    # As in "tiny", three heads, and a third of the layers in the text tower.
    sizes = {
        "patch": options.patch_size,
        "image": (width, layers, 3),
        "text": (width, max(1, layers // 3), 3),
        "projection": width,
    }
    return make_clip(sizes, **shape, activation="gelu", dtype=None)


def tuning_of(model, options, steps):
    """The model for the last part on whole images, whose rate falls on to zero."""
    whole = model.without_masking()
    rate = float(model.optimizer.learning_rate)
    schedule = keras.optimizers.schedules.PolynomialDecay(rate, steps // PARTS, 0.0)
    config = model.optimizer.get_config() | {"learning_rate": schedule}
    whole.compile(type(model.optimizer).from_config(config))
    return whole


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
