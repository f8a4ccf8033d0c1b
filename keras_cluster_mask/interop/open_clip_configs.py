"""Reads and writes model configs of open_clip, or refuses them with the reasons."""

import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from keras_cluster_mask.checks import is_integer
from keras_cluster_mask.interop.architectures import (
    CLIP_EPSILON,
    Architecture,
    Tower,
    reasons_of_pixels,
    reasons_of_sizes,
    square,
)
from keras_cluster_mask.models.encoders import METACLIP_2_END_ID
from keras_cluster_mask.models.pixels import CLIP_MEAN, CLIP_STD

# The file that open_clip writes beside a model's weights.
OPEN_CLIP_CONFIG_FILE = "open_clip_config.json"

# The entries that are read, with the defaults of open_clip's `CLIPVisionCfg` and
# `CLIPTextCfg`.
_BOTH = dict(layers=12, mlp_ratio=4.0)
READ = {
    "vision_cfg": dict(_BOTH, width=768, head_width=64, patch_size=16, image_size=224),
    "text_cfg": dict(_BOTH, width=512, heads=8, context_length=77, vocab_size=49408),
}

# Entries for which keras_hub's models support one behavior only, with the values that
# select it.
_OFF = None, False
_BLOCK = {
    "ls_init_value": (None,),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": CLIP_EPSILON}),
    "block_type": (None, "default"),
    **dict.fromkeys(("output_tokens", "qk_norm", "scaled_cosine_attn"), _OFF),
    **dict.fromkeys(("scale_heads", "scale_attn_inner", "scale_attn"), _OFF),
    "scale_fc": _OFF,
}
FIXED = {
    "vision_cfg": {
        **_BLOCK,
        "timm_model_name": (None, ""),
        "attentional_pool": _OFF,
        "no_ln_pre": _OFF,
        "pos_embed_type": ("learnable",),
        "pool_type": ("tok",),
    },
    "text_cfg": {
        **_BLOCK,
        "hf_model_name": (None, ""),
        "embed_cls": _OFF,
        "no_causal_mask": _OFF,
        "pool_type": ("argmax", "eos"),
        "proj_bias": _OFF,
        "proj_type": ("linear",),
    },
}

# Prefixes of keys that do not affect embeddings: training, tokens, options of parts
# that are refused, and the order of pooling and normalization.
IGNORED = {
    "vision_cfg": ("attn_pooler_", "final_ln_after_pool", "patch_dropout", "timm_"),
    "text_cfg": ("eos_id", "final_ln_after_pool", "hf_", "pad_id", "tokenizer_"),
}
_LOSS = "init_logit_bias", "init_logit_scale", "nonscalar_logit_scale"
TOP = "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", *_LOSS
# Resizing must be configured in the dataset.
_RESIZING = "fill_color", "interpolation", "resize_mode"
PREPROCESSING = "size", "mode", "mean", "std", *_RESIZING


def read_config(config: Any) -> tuple[dict, dict, str]:
    """Reads the config of a model by its name, from a file or from a dictionary.

    Args:
        config: The name of a config of open_clip, the path of a `.json` file, or a
            dictionary, as `load_open_clip` takes it.

    Returns:
        A tuple: the dictionary of the model, the dictionary of the preprocessing, and a
        description for errors.
    """
    if isinstance(config, Mapping):
        label = f"config with the keys {sorted(map(str, config))}"
    elif isinstance(config, os.PathLike) or str(config).endswith(".json"):
        label = f"config={os.fspath(config)!r}"
        config = read_json("config", config)
    elif isinstance(config, str):
        label = f"config={config!r}"
        config = _read_named(config)
    else:
        raise ValueError(
            "`config` must be the name of a config of open_clip, the path of a .json "
            f"file, or a dictionary. Received: config={config!r}"
        )
    preprocessing = {}
    if isinstance(config, Mapping) and "model_cfg" in config:
        preprocessing = config.get("preprocess_cfg") or {}
        config = config["model_cfg"]
    keys = "embed_dim", "vision_cfg", "text_cfg"
    if not isinstance(config, Mapping) or any(key not in config for key in keys):
        raise ValueError(
            "`config` must be as open_clip writes it, with `embed_dim`, `vision_cfg` "
            "and `text_cfg`, or with these under `model_cfg`. `load_hugging_face` "
            f"reads models of transformers. Received: {label}"
        )
    return dict(config), dict(preprocessing), label


def architecture_of(model: dict, preprocessing: dict, label: str) -> Architecture:
    """Returns the architecture in an open_clip config, if keras_hub supports it.

    Args:
        model: The dictionary of the model, as `read_config` returns it.
        preprocessing: The dictionary of the preprocessing.
        label: A description of the config for errors.

    Raises:
        ValueError: If it does not, with all reasons.
    """
    reasons = _reasons(model, preprocessing)
    if reasons:
        raise ValueError(
            "`config` must describe a CLIP that keras_hub's `CLIPBackbone` or "
            "`MetaCLIP2Backbone` can hold, and it does not: "
            f"{'; '.join(reasons)}. Received: {label}"
        )
    vision, text = ({**READ[part], **model[part]} for part in READ)
    mean, std = _pixels(preprocessing)
    heads = vision["width"] // vision["head_width"], text["heads"]
    towers = (
        Tower(x["width"], x["layers"], n, int(x["width"] * x["mlp_ratio"]))
        for x, n in zip((vision, text), heads)
    )
    return Architecture(
        "metaclip_2" if text.get("pool_type") == "eos" else "clip",
        *towers,
        patch=square(vision["patch_size"]),
        image_size=square(vision["image_size"]),
        vocabulary=text["vocab_size"],
        context=text["context_length"],
        projection=model["embed_dim"],
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        pixel_mean=tuple(mean),
        pixel_std=tuple(std),
    )


def resizing_of(preprocessing: dict) -> tuple[str, str]:
    """Returns the resize mode and the interpolation for evaluation."""
    interpolation = preprocessing.get("interpolation") or "bicubic"
    # In evaluation open_clip uses bicubic interpolation for "random".
    interpolation = "bicubic" if interpolation == "random" else interpolation
    return preprocessing.get("resize_mode") or "shortest", interpolation


def config_of(architecture: Architecture, logit_bias: float | None) -> dict:
    """Returns the config from which open_clip makes the same model.

    Args:
        architecture: An `Architecture`.
        logit_bias: Float, or `None` for a softmax loss.
    """
    image, text = architecture.image, architecture.text
    of_image, of_text = (
        {"layers": x.layers, "width": x.width, "mlp_ratio": _ratio(x.hidden, x.width)}
        for x in (image, text)
    )
    model = {
        "embed_dim": architecture.projection,
        "quick_gelu": architecture.activation == "quick_gelu",
        "vision_cfg": {
            **of_image,
            "image_size": architecture.image_size,
            "head_width": image.width // image.heads,
            "patch_size": architecture.patch,
        },
        "text_cfg": {
            **of_text,
            "context_length": architecture.context,
            "vocab_size": architecture.vocabulary,
            "heads": text.heads,
        },
    }
    if architecture.kind == "metaclip_2":
        model["text_cfg"].update(pool_type="eos", eos_id=METACLIP_2_END_ID)
    if logit_bias is not None:
        model["init_logit_bias"] = logit_bias
    return {
        "model_cfg": model,
        "preprocess_cfg": {
            "mean": [*architecture.pixel_mean],
            "std": [*architecture.pixel_std],
        },
    }


def read_json(argument: str, path: str | os.PathLike) -> Any:
    """Reads the JSON file that an argument names."""
    path = pathlib.Path(path).expanduser()
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"`{argument}` must be a file that exists. "
            f"Received: {argument}={str(path)!r}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must be a file of JSON ({error}). "
            f"Received: {argument}={str(path)!r}"
        ) from error


def _read_named(name):
    # The package is not imported, since that needs torch and takes seconds.
    package = importlib.util.find_spec("open_clip")
    if package is None:
        raise ImportError(
            "`config` is the name of a config of open_clip, which needs open_clip "
            "(`pip install open_clip_torch`). The path of an `open_clip_config.json` "
            f"does not. Received: config={name!r}"
        )
    folder = pathlib.Path(package.submodule_search_locations[0]) / "model_configs"
    paths = {path.stem: path for path in folder.glob("*.json")}
    # open_clip writes OpenAI's "ViT-B/32" with a hyphen.
    stem = name.replace("/", "-")
    if stem not in paths:
        raise ValueError(
            "`config` must be the name of a config of the installed open_clip, as "
            "`open_clip.list_models()` lists them, or the path of a .json file. "
            f"Received: config={name!r}"
        )
    return read_json("config", paths[stem])


def _reasons(model, preprocessing):
    """Lists why a config is not supported, one text per reason."""
    found = [f"unknown key `{key}`" for key in model.keys() - {*TOP}]
    found += [
        f"unknown key `preprocess_cfg.{key}`"
        for key in preprocessing.keys() - {*PREPROCESSING}
    ]
    if not is_integer(model["embed_dim"]) or model["embed_dim"] < 1:
        found.append(f"embed_dim={model['embed_dim']!r} is not a positive integer")
    for part in READ:
        found += _reasons_of_tower(part, model[part])
    if not found:
        found = _reasons_of_images(model["vision_cfg"], preprocessing)
    return sorted(found)


def _reasons_of_tower(part, given):
    if not isinstance(given, Mapping):
        return [f"`{part}` is not a dictionary"]
    unknown = given.keys() - READ[part].keys() - FIXED[part].keys()
    found = [
        f"unknown key `{part}.{key}`"
        for key in map(str, unknown)
        if not key.startswith(IGNORED[part])
    ]
    found += [
        f"{part}.{key}={given[key]!r}"
        for key, allowed in FIXED[part].items()
        if key in given and given[key] not in allowed
    ]
    end = given.get("eos_id", METACLIP_2_END_ID)
    if given.get("pool_type") == "eos" and end != METACLIP_2_END_ID:
        found.append(
            f"{part}.eos_id={end}: keras_hub's `MetaCLIP2Backbone` pools texts at the "
            f"id {METACLIP_2_END_ID}"
        )
    divisor = "head_width" if part == "vision_cfg" else "heads"
    values = {**READ[part], **given}
    return found or reasons_of_sizes(part, values, READ[part], divisor, "width")


def _reasons_of_images(vision, preprocessing):
    found = []
    size, mode = preprocessing.get("size"), preprocessing.get("mode") or "RGB"
    image_size = square(vision.get("image_size", READ["vision_cfg"]["image_size"]))
    if size is not None and square(size) != image_size:
        found.append(f"preprocess_cfg.size={size} is not the image size {image_size}")
    if mode != "RGB":
        found.append(f"preprocess_cfg.mode={mode!r}: images must be RGB")
    return found + reasons_of_pixels("preprocess_cfg.", *_pixels(preprocessing))


def _pixels(preprocessing):
    """Returns the mean and deviation of pixels, by default CLIP's."""
    mean, std = preprocessing.get("mean"), preprocessing.get("std")
    return CLIP_MEAN if mean is None else mean, CLIP_STD if std is None else std


def _ratio(hidden, width):
    """Returns the `mlp_ratio` from which open_clip computes `hidden`, rounding down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
