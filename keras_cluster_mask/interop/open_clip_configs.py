"""Reads and writes model configs of open_clip, or refuses them with the reasons."""

import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from keras_cluster_mask.encoders.architecture import Architecture
from keras_cluster_mask.encoders.families import CLIP_MEAN, CLIP_STD, TEXT_FAMILIES
from keras_cluster_mask.interop.configs import (
    CLIP_EPSILON,
    ConfigEntry,
    choice,
    fixed,
    flatten,
    read_entries,
    read_json,
    side_of,
)

# The file that open_clip writes next to a model's weights.
OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"

ACTIVATIONS = {False: "gelu", None: "gelu", True: "quick_gelu"}
FAMILIES = {"argmax": "CLIP", "eos": "MetaCLIP2"}

# The entries that are read and written, with open_clip's defaults.
READ = {
    "embed_dim": ConfigEntry("projection", None, "count"),
    "quick_gelu": choice("activation", ACTIVATIONS),
    "vision_cfg.image_size": ConfigEntry("image_size", 224, "square"),
    "vision_cfg.patch_size": ConfigEntry("patch", 16, "square"),
    "vision_cfg.width": ConfigEntry("image_width", 768, "count"),
    "vision_cfg.layers": ConfigEntry("image_layers", 12, "count"),
    "vision_cfg.head_width": ConfigEntry("image_heads", 64, "count"),
    "vision_cfg.mlp_ratio": ConfigEntry("image_hidden", 4.0, "ratio"),
    "text_cfg.context_length": ConfigEntry("context", 77, "count"),
    "text_cfg.vocab_size": ConfigEntry("vocabulary", 49408, "count"),
    "text_cfg.width": ConfigEntry("text_width", 512, "count"),
    "text_cfg.layers": ConfigEntry("text_layers", 12, "count"),
    "text_cfg.heads": ConfigEntry("text_heads", 8, "count"),
    "text_cfg.mlp_ratio": ConfigEntry("text_hidden", 4.0, "ratio"),
    "text_cfg.pool_type": choice("family", FAMILIES),
    "preprocess_cfg.mean": ConfigEntry("pixel_mean", CLIP_MEAN, "mean of 3 channels"),
    "preprocess_cfg.std": ConfigEntry("pixel_std", CLIP_STD, "deviation of 3 channels"),
}

# open_clip's names for the ways in which images become square, and back.
RESIZE = {"shortest": "crop", "squash": "squash"}
MODES = {name: mode for mode, name in RESIZE.items()}

# Options that keras_hub's models do not have, and other entries of which they support
# some values only.
_OPTIONS = {
    **dict.fromkeys(
        ("act_kwargs", "attentional_pool", "embed_cls", "hf_model_name", "qk_norm")
        + ("no_causal_mask", "no_ln_pre", "output_tokens", "proj_bias", "scale_attn")
        + ("scale_attn_inner", "scale_fc", "scale_heads", "scaled_cosine_attn")
        + ("timm_model_name",),
        fixed(None, False, "", {}),
    ),
    # open_clip scales layers for any value, 0 too.
    "ls_init_value": fixed(None),
    "block_type": fixed(None, "default"),
    "norm_kwargs": fixed(None, {}, {"eps": CLIP_EPSILON}),
}
FIXED = {
    **{f"vision_cfg.{key}": entry for key, entry in _OPTIONS.items()},
    **{f"text_cfg.{key}": entry for key, entry in _OPTIONS.items()},
    "vision_cfg.pool_type": fixed("tok"),
    "vision_cfg.pos_embed_type": fixed("learnable"),
    "text_cfg.proj_type": fixed("linear"),
    "preprocess_cfg.mode": fixed("RGB"),
}

# Prefixes of entries that do not affect embeddings, or that `read_config` handles:
# training, tokens, options of parts that are refused, and the order of pooling and
# normalization.
IGNORED = (
    *("custom_text", "init_logit_", "nonscalar_logit_scale"),
    *("vision_cfg.attn_pooler_", "vision_cfg.final_ln_after_pool"),
    *("vision_cfg.patch_dropout", "vision_cfg.timm_"),
    *("text_cfg.eos_id", "text_cfg.final_ln_after_pool", "text_cfg.hf_"),
    *("text_cfg.pad_id", "text_cfg.tokenizer_"),
    *("preprocess_cfg.size", "preprocess_cfg.resize_mode"),
    *("preprocess_cfg.fill_color", "preprocess_cfg.interpolation"),
)
PARTS = "vision_cfg", "text_cfg", "preprocess_cfg"


def read_config(config: Any) -> Architecture:
    """Reads the config of a model by its name, from a file or from a dictionary.

    Args:
        config: The name of a config of open_clip, the path of a `.json` file, or a
            dictionary, as `load_open_clip` takes it.

    Raises:
        ValueError: If there is no such config, or if keras_hub does not support its
            model, with all reasons.
    """
    given = config
    if isinstance(config, os.PathLike) or str(config).endswith(".json"):
        given = read_json(config)
    elif not isinstance(config, Mapping):
        given = _read_named(str(config))
    whole = {"model_cfg": given, **given}
    # open_clip writes null for what has the default.
    preprocessing = whole.get("preprocess_cfg") or {}
    preprocessing = {k: x for k, x in preprocessing.items() if x is not None}
    given = flatten({**whole["model_cfg"], "preprocess_cfg": preprocessing}, PARTS)
    fields, reasons = read_entries(given, READ | FIXED)
    known = READ.keys() | FIXED.keys()
    reasons += [
        f"unknown key `{key}`"
        for key in map(str, given)
        if key not in known and not key.startswith(IGNORED)
    ]
    end_id = TEXT_FAMILIES["MetaCLIP2TextEncoder"].end_id
    end = given.get("text_cfg.eos_id", end_id)
    if fields["family"] == "MetaCLIP2" and end != end_id:
        reasons.append(f"text_cfg.eos_id={end}: keras_hub pools at the id {end_id}")
    size, image_size = given.get("preprocess_cfg.size"), fields["image_size"]
    if size is not None and side_of(size) != image_size:
        reasons.append(f"preprocess_cfg.size={size} is not the image size {image_size}")
    if reasons:
        raise ValueError(
            "`config` must be an open_clip config of a model that keras_hub's "
            "`CLIPBackbone` or `MetaCLIP2Backbone` supports. Not supported: "
            f"{'; '.join(sorted(reasons))}. For models of transformers, use "
            f"`load_hugging_face`. Received: config={config!r}"
        )
    mode = given.get("preprocess_cfg.resize_mode", "shortest")
    fields.update(
        image_heads=fields["image_width"] // fields["image_heads"],
        image_hidden=int(fields["image_width"] * fields["image_hidden"]),
        text_hidden=int(fields["text_width"] * fields["text_hidden"]),
        loss="softmax" if given.get("init_logit_bias") is None else "sigmoid",
        resize=RESIZE.get(mode, mode),
        tokenizer=_tokenizer(given, fields["vocabulary"]),
    )
    return Architecture(**fields)


def write_config(architecture: Architecture, logit_bias: Any) -> dict:
    """Returns the config from which open_clip makes the same model.

    Args:
        architecture: An `Architecture`.
        logit_bias: Number or array without axes, or `None` for a softmax loss.
    """
    if architecture.activation not in ACTIVATIONS.values():
        raise ValueError(
            "`model` must have an activation that open_clip supports, 'gelu' or "
            f"'quick_gelu'. Received: activation {architecture.activation!r}"
        )
    image_width, text_width = architecture.image_width, architecture.text_width
    entries = {
        **{key: getattr(architecture, x.field) for key, x in READ.items()},
        "quick_gelu": architecture.activation == "quick_gelu",
        "vision_cfg.head_width": image_width // architecture.image_heads,
        "vision_cfg.mlp_ratio": _ratio(architecture.image_hidden, image_width),
        "text_cfg.mlp_ratio": _ratio(architecture.text_hidden, text_width),
        "text_cfg.pool_type": "argmax",
        "preprocess_cfg.resize_mode": MODES[architecture.resize],
    }
    if architecture.family == "MetaCLIP2":
        end_id = TEXT_FAMILIES["MetaCLIP2TextEncoder"].end_id
        entries.update({"text_cfg.pool_type": "eos", "text_cfg.eos_id": end_id})
        # Without it, open_clip would use CLIP's tokenizer.
        entries["text_cfg.hf_tokenizer_name"] = "facebook/xlm-v-base"
    if logit_bias is not None:
        entries["init_logit_bias"] = float(logit_bias)
    model = {}
    for key, value in entries.items():
        part, _, name = key.rpartition(".")
        (model.setdefault(part, {}) if part else model)[name] = value
    return {"preprocess_cfg": model.pop("preprocess_cfg"), "model_cfg": model}


def _tokenizer(given, vocabulary):
    """Returns the field of `Architecture` for the tokenizer of a config."""
    if given.get("text_cfg.tokenizer_kwargs"):
        # They change what a tokenizer does to texts.
        return None
    if given.get("text_cfg.hf_tokenizer_name"):
        return "hugging_face"
    return "clip" if vocabulary == READ["text_cfg.vocab_size"].default else None


def _read_named(name):
    # The package is not imported, since that needs torch and takes seconds.
    package = importlib.util.find_spec("open_clip")
    if package is None:
        raise ImportError(
            "`config` is the name of an open_clip config, which needs open_clip: `pip "
            "install open_clip_torch`, or pass the path of an `open_clip_config.json`. "
            f"Received: config={name!r}"
        )
    folder = pathlib.Path(package.submodule_search_locations[0]) / "model_configs"
    paths = {path.stem: path for path in folder.glob("*.json")}
    # open_clip writes OpenAI's "ViT-B/32" with a hyphen.
    stem = name.replace("/", "-")
    if stem not in paths:
        raise ValueError(
            "`config` must be the name of a config in the installed open_clip, as "
            "`open_clip.list_models()` returns them, or the path of a .json file. "
            f"Received: config={name!r}"
        )
    return read_json(paths[stem])


def _ratio(hidden, width):
    """Returns the `mlp_ratio` from which open_clip computes `hidden`, rounding down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
