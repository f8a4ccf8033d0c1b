"""Loads CLIP, MetaCLIP 2 and SigLIP models of Hugging Face's transformers."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from keras_cluster_mask.checks import is_number
from keras_cluster_mask.interop.architectures import (
    CLIP_EPSILON,
    Architecture,
    Tower,
    reasons_of_pixels,
    reasons_of_sizes,
    square,
    warn_of_resizing,
)
from keras_cluster_mask.interop.open_clip_configs import read_json
from keras_cluster_mask.interop.state_dicts import match, read_state_dict
from keras_cluster_mask.interop.tensor_names import CLIP, METACLIP_2, SIGLIP
from keras_cluster_mask.interop.weight_files import find_weights
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models import ContrastiveModel
from keras_cluster_mask.models.encoders import METACLIP_2_END_ID
from keras_cluster_mask.models.pixels import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN

# The files that transformers writes into a folder.
WEIGHT_FILES = "model.safetensors", "pytorch_model.bin"
CONFIG_FILE = "config.json"
# Newer versions write the second file, which holds the first under "image_processor".
PREPROCESSING_FILES = "preprocessor_config.json", "processor_config.json"

# Defaults of transformers' configs, which omit entries with default values. These are
# in the order of `Tower`.
_TOWER = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
)
_TEXT = dict(_TOWER, hidden_size=512, num_attention_heads=8, intermediate_size=2048)
_IMAGES = dict(_TOWER, num_channels=3, image_size=224)
_CLIP = dict(hidden_act="quick_gelu", layer_norm_eps=CLIP_EPSILON)
_SIGLIP = dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
_WORDS = dict(vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)
DEFAULTS = {
    "clip": {
        "text_config": {**_TEXT, **_CLIP, **_WORDS},
        "vision_config": dict(_IMAGES | _CLIP, patch_size=32),
    },
    "siglip": {
        "text_config": dict(
            _TOWER | _SIGLIP, vocab_size=32000, max_position_embeddings=64
        ),
        "vision_config": dict(_IMAGES | _SIGLIP, patch_size=16, vision_use_head=True),
    },
}
DEFAULTS["metaclip_2"] = DEFAULTS["clip"]
NAMES = {"clip": CLIP, "metaclip_2": METACLIP_2, "siglip": SIGLIP}
PIXELS = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "metaclip_2": (CLIP_MEAN, CLIP_STD),
    "siglip": (SIGLIP_MEAN, SIGLIP_MEAN),
}

# PIL's filters by the numbers that `resample` uses.
INTERPOLATIONS = dict(
    enumerate(["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
)

# keras_hub's names for transformers' activations.
_PLAIN = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
_TANH = dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), "gelu_approximate")
ACTIVATIONS = {
    "clip": _PLAIN,
    "metaclip_2": _PLAIN,
    "siglip": {"gelu": "gelu", **_TANH},
}

# The end token's id that old CLIP configs state by mistake. transformers then pools at
# the highest id.
OLD_END_ID = 2


def load_hugging_face(
    source: str | os.PathLike,
    *,
    dtype: Any = None,
    masking: PatchMasking | None = None,
    **kwargs: Any,
) -> ContrastiveModel:
    """Loads a CLIP, MetaCLIP 2 or SigLIP model saved by transformers.

    Reads the files that `save_pretrained` of `CLIPModel`, `MetaClip2Model` and
    `SiglipModel` writes, and those of a downloaded model, without transformers. Sizes,
    attention heads and activation are read from `config.json`, and the mean and
    deviation of pixels from `preprocessor_config.json` or `processor_config.json`;
    without either file, they are the defaults for the kind of model. Other models of
    transformers, such as `Siglip2Model`, and models that keras_hub's backbones cannot
    compute are refused. Half-precision weights become float32.

    Resize images in the dataset as in training: squash them for SigLIP
    (`resize="squash"`), crop them for the others. A warning is issued if the model was
    not trained with a center crop and bicubic interpolation.

    Example:

    ```python
    model = kcm.interop.load_hugging_face(
        "clip-vit-base-patch32", masking=kcm.ClusterMasking(patch_size=32)
    )
    ```

    Args:
        source: Path of a folder with `model.safetensors` (read without torch) or
            `pytorch_model.bin`, and `config.json`; or path of the file of weights in
            such a folder.
        dtype: A dtype policy for the computations, such as `"mixed_bfloat16"`.
        masking: A `PatchMasking` layer, or `None`.
        **kwargs: Arguments of `ContrastiveModel.from_backbone`, which take precedence.

    Returns:
        A `ContrastiveModel`. Its `backbone` is a `keras_hub.models.CLIPBackbone`,
        `MetaCLIP2Backbone` or `SigLIPBackbone`.

    Raises:
        ValueError: If a file cannot be read or contains Python code; if the config
            describes an unsupported model, with the reasons; or if the weights do not
            match it, with a list of all entries that are missing, unexpected, of a
            wrong shape, or not finite.
        FileNotFoundError: If a file does not exist.
        ImportError: If a `.safetensors` file is read without safetensors, or another
            one without torch.

    Reference:
        - [transformers](https://github.com/huggingface/transformers),
          `modeling_clip.py`, `modeling_metaclip_2.py` and `modeling_siglip.py`.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            "`source` must be the path of a folder or of a file. "
            f"Received: source of type {type(source).__name__}"
        )
    if not pathlib.Path(source).expanduser().exists():
        raise FileNotFoundError(
            "`source` must be a folder or a file that exists. "
            "`huggingface_hub.snapshot_download` downloads a model by its name. "
            f"Received: source={os.fspath(source)!r}"
        )
    source = find_weights(source, WEIGHT_FILES)
    folder = pathlib.Path(source).expanduser().parent
    kind, text, vision, reasons = _read_config(folder)
    preprocessing, name = _read_preprocessing(folder)
    reasons += _reasons_of_preprocessing(preprocessing, name, kind)
    if reasons:
        raise ValueError(
            "`source` must hold a model that keras_hub's backbones can hold, "
            f"and this one is not: {'; '.join(sorted(reasons))}. "
            f"Received: source={str(source)!r}"
        )
    towers = (Tower(*map(config.get, _TOWER)) for config in (vision, text))
    architecture = Architecture(
        kind,
        *towers,
        patch=square(vision["patch_size"]),
        image_size=square(vision["image_size"]),
        vocabulary=text["vocab_size"],
        context=text["max_position_embeddings"],
        projection=text["projection"],
        activation=ACTIVATIONS[kind][text["hidden_act"]],
    )
    names = NAMES[kind]
    found = match(*read_state_dict(source, names), names, architecture.sizes)
    backbone = architecture.make(dtype)
    for entry, array in found:
        entry.write(backbone, array)
    warn_of_resizing(*_resizing(preprocessing, kind))
    mean, std = _pixels(preprocessing, kind)
    options = {"pixel_mean": mean, "pixel_std": std, **kwargs}
    return ContrastiveModel.from_backbone(backbone, masking=masking, **options)


def _read_config(folder):
    """Returns a model's kind, its two tower configs, and why it cannot be loaded."""
    path = folder / CONFIG_FILE
    config = read_json("source", path)
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or kind not in NAMES:
        raise ValueError(
            f"`source` must be a model of transformers whose {CONFIG_FILE} has a "
            f"`model_type` of {sorted(NAMES)}. `load_open_clip` reads models of "
            f"open_clip. Received: source={str(path)!r}, with model_type={kind!r}"
        )
    text, vision = (_tower(config, kind, name) for name in DEFAULTS[kind])
    if kind == "siglip":
        # SigLIP has no image projection.
        text["projection"] = text.get("projection_size") or text["hidden_size"]
    else:
        text["projection"] = config.get("projection_dim", 512)
    reasons = [
        *_reasons_of_tower(kind, "text_config", text),
        *_reasons_of_tower(kind, "vision_config", vision),
    ]
    if vision["num_channels"] != 3:
        reasons.append(f"vision_config.num_channels={vision['num_channels']} is not 3")
    if vision["hidden_act"] != text["hidden_act"]:
        reasons.append("the towers differ in `hidden_act`")
    if kind == "siglip":
        if not vision["vision_use_head"]:
            reasons.append("vision_config.vision_use_head=False: images are not pooled")
        if text["projection"] != vision["hidden_size"]:
            reasons.append(
                f"text_config.projection_size={text['projection']} is not the width of "
                f"the image tower, {vision['hidden_size']}"
            )
    elif not reasons:
        ends = {
            "clip": (OLD_END_ID, text["vocab_size"] - 1),
            "metaclip_2": (METACLIP_2_END_ID,),
        }[kind]
        if text["eos_token_id"] not in ends:
            reasons.append(
                f"text_config.eos_token_id={text['eos_token_id']} is not {ends[-1]}, "
                "the id at which keras_hub pools texts"
            )
    return kind, text, vision, reasons


def _tower(config, kind, name):
    # Old configs have a second dictionary. transformers fills it with defaults and then
    # prefers it.
    given = config.get(f"{name}_dict") or config.get(name) or {}
    return {**DEFAULTS[kind][name], **given}


def _reasons_of_tower(kind, name, tower):
    sizes = "vocab_size", "max_position_embeddings", "projection"
    if name == "vision_config":
        sizes = "image_size", "patch_size"
    found = reasons_of_sizes(
        name, tower, [*_TOWER, *sizes], "num_attention_heads", "hidden_size"
    )
    # A list, since unhashable values can be searched for in it too.
    activations = [*ACTIVATIONS[kind]]
    if tower["hidden_act"] not in activations:
        found.append(
            f"{name}.hidden_act={tower['hidden_act']!r} is not one of {activations}"
        )
    epsilon = DEFAULTS[kind][name]["layer_norm_eps"]
    if tower["layer_norm_eps"] != epsilon:
        found.append(
            f"{name}.layer_norm_eps={tower['layer_norm_eps']} is not {epsilon}"
        )
    return found


def _read_preprocessing(folder):
    """Returns the image preprocessing, and the name of the file that states it."""
    paths = [folder / name for name in PREPROCESSING_FILES]
    path = next(filter(pathlib.Path.is_file, paths), None)
    if path is None:
        return {}, None
    config = read_json("source", path)
    return config.get("image_processor", config), path.name


def _reasons_of_preprocessing(config, name, kind):
    """Lists why images cannot be preprocessed as in the model's training."""
    found = []
    factor = config.get("rescale_factor") or 1 / 255
    if not config.get("do_rescale", True) or abs(255 * factor - 1) > 1e-6:
        found.append(f"{name}: pixels are not divided by 255")
    if config.get("resample") not in (None, *INTERPOLATIONS):
        found.append(f"{name}: resample={config['resample']!r} is not a filter of PIL")
    return found + reasons_of_pixels(f"{name}: image_", *_pixels(config, kind))


def _pixels(config, kind):
    """Returns the mean and deviation by channel; a config may state single numbers."""
    if not config.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    given = config.get("image_mean"), config.get("image_std")
    found = (y if x is None else x for x, y in zip(given, PIXELS[kind]))
    return tuple((x,) * 3 if is_number(x) else x for x in found)


def _resizing(config, kind):
    """Returns the resize mode and the interpolation, under open_clip's names."""
    size, resample = config.get("size"), config.get("resample")
    has_height = isinstance(size, Mapping) and "height" in size
    return (
        "squash" if has_height or kind == "siglip" else "shortest",
        "bicubic" if resample is None else INTERPOLATIONS[resample],
    )
