"""Loads CLIP and SigLIP models of Hugging Face's transformers."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_cluster_mask.checks import is_number
from keras_cluster_mask.encoders.architecture import Architecture
from keras_cluster_mask.encoders.families import (
    CLIP_MEAN,
    CLIP_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
)
from keras_cluster_mask.interop.configs import (
    CLIP_EPSILON,
    ConfigEntry,
    choice,
    fixed,
    flatten,
    read_entries,
    read_json,
)
from keras_cluster_mask.interop.state_dicts import load_model
from keras_cluster_mask.interop.tensor_names import CLIP, SIGLIP
from keras_cluster_mask.interop.weight_files import INDEX, find_weights
from keras_cluster_mask.models import ContrastiveModel

# The files that transformers writes into a folder.
SINGLE_FILES = "model.safetensors", "pytorch_model.bin"
WEIGHT_FILES = *SINGLE_FILES, *(name + INDEX for name in SINGLE_FILES)
CONFIG_FILE = "config.json"
# The files of image processors. Newer versions write the second one, which holds the
# first under "image_processor".
PREPROCESSING_FILES = "preprocessor_config.json", "processor_config.json"

# The families of an `Architecture` by `model_type`, and the names of their tensors.
FAMILIES = {"clip": "CLIP", "siglip": "SigLIP"}
NAMES = {"CLIP": CLIP, "SigLIP": SIGLIP}

# The end token's id that old CLIP configs state by mistake. transformers then pools at
# the highest id.
OLD_END_ID = 2


def _tower(part, tower, sizes, activations, epsilon):
    """Returns the entries of a tower, with the default sizes of transformers."""
    width, layers, heads, hidden = sizes
    return {
        f"{part}.hidden_size": ConfigEntry(f"{tower}_width", width, "count"),
        f"{part}.num_hidden_layers": ConfigEntry(f"{tower}_layers", layers, "count"),
        f"{part}.num_attention_heads": ConfigEntry(f"{tower}_heads", heads, "count"),
        f"{part}.intermediate_size": ConfigEntry(f"{tower}_hidden", hidden, "count"),
        f"{part}.hidden_act": choice("activation", activations),
        f"{part}.layer_norm_eps": fixed(epsilon),
    }


# The entries of configs, with the defaults of transformers, which omits entries with
# default values.
_BASE = 768, 12, 12, 3072
_TANH = dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), "gelu_approximate")
_CLIP = {"quick_gelu": "quick_gelu", "gelu": "gelu"}, CLIP_EPSILON
_SIGLIP = {**_TANH, "gelu": "gelu"}, 1e-6
_BOTH = {
    "vision_config.num_channels": fixed(3),
    "vision_config.image_size": ConfigEntry("image_size", 224, "square"),
}
ENTRIES = {
    "CLIP": {
        **_BOTH,
        **_tower("vision_config", "image", _BASE, *_CLIP),
        **_tower("text_config", "text", (512, 12, 8, 2048), *_CLIP),
        "vision_config.patch_size": ConfigEntry("patch", 32, "square"),
        "text_config.vocab_size": ConfigEntry("vocabulary", 49408, "count"),
        "text_config.max_position_embeddings": ConfigEntry("context", 77, "count"),
        "projection_dim": ConfigEntry("projection", 512, "count"),
    },
    "SigLIP": {
        **_BOTH,
        **_tower("vision_config", "image", _BASE, *_SIGLIP),
        **_tower("text_config", "text", _BASE, *_SIGLIP),
        "vision_config.patch_size": ConfigEntry("patch", 16, "square"),
        "vision_config.vision_use_head": fixed(True),
        "text_config.vocab_size": ConfigEntry("vocabulary", 32000, "count"),
        "text_config.max_position_embeddings": ConfigEntry("context", 64, "count"),
    },
}
PARTS = "text_config", "vision_config"


def load_hugging_face(
    source: str | os.PathLike, *, dtype: Any = None, **kwargs: Any
) -> ContrastiveModel:
    """Loads a CLIP or SigLIP model saved by transformers.

    Reads the files of a downloaded model, and the files that `save_pretrained` of
    `CLIPModel` and `SiglipModel` writes, without transformers. Sizes, attention heads
    and activation are read from `config.json`, and the mean and deviation of pixels
    from `preprocessor_config.json` or `processor_config.json`; without either file,
    they are the defaults for the kind of model. Other models of transformers, such as
    `Siglip2Model`, and models that keras_hub's backbones cannot compute are refused.
    Half-precision weights become float32. keras_hub itself reads a MetaCLIP 2: use
    `ContrastiveModel.from_preset`.

    The model resizes images as in its training: it squashes them for SigLIP, and crops
    them for CLIP. A warning is issued if the files state another method. Files
    that state another image size than the model's are refused.

    Example:

    ```python
    model = kcm.interop.load_hugging_face(
        "clip-vit-base-patch32", masking=kcm.ClusterMasking(patch_size=32)
    )
    ```

    Args:
        source: Path of a folder with `config.json` and `model.safetensors` (read
            without torch), `pytorch_model.bin`, or several such files and their
            `.index.json`. Or the path of the weight file, or of the index, in such a
            folder.
        dtype: A dtype policy for the computations, such as `"mixed_bfloat16"`.
        **kwargs: Arguments of `ContrastiveModel.from_backbone`, such as `masking`. They
            take precedence over the files. `tokenizer` defaults to the one in the
            folder: a `CLIPTokenizer` of `vocab.json` and `merges.txt`, or a tokenizer
            of transformers, which needs the package.

    Returns:
        A `ContrastiveModel`. Its `backbone` is a `keras_hub.models.CLIPBackbone` or
        `SigLIPBackbone`.

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
          `modeling_clip.py` and `modeling_siglip.py`.
    """
    source = find_weights(pathlib.Path(source), WEIGHT_FILES)
    fields, reasons = _read_config(source.parent / CONFIG_FILE)
    of_images, more_reasons = _read_preprocessing(source.parent, fields)
    if reasons or more_reasons:
        raise ValueError(
            "`source` must be a model that the backbones of keras_hub support. Not "
            f"supported: {'; '.join(sorted(reasons + more_reasons))}. Received: "
            f"source={str(source)!r}"
        )
    architecture = Architecture(**fields, **of_images, tokenizer="hugging_face")
    return load_model(source, NAMES[architecture.family], architecture, dtype, kwargs)


def _read_config(path):
    """Returns fields of `Architecture`, and why the model cannot be loaded."""
    config = read_json(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"`source` must be a model of transformers, with a {CONFIG_FILE} in which "
            f"`model_type` is one of {sorted(FAMILIES)}. For models of open_clip, use "
            "`load_open_clip`. For a MetaCLIP 2, use "
            "`kcm.ContrastiveModel.from_preset(folder, "
            "tokenizer=transformers.AutoTokenizer.from_pretrained(folder))`. Received: "
            f"source={str(path)!r}, with model_type={kind!r}"
        )
    # Old configs have a second dictionary. transformers fills it with defaults and then
    # prefers it.
    parts = {x: config.get(f"{x}_dict") or config.get(x) for x in PARTS}
    given = flatten({**config, **parts}, PARTS)
    family = FAMILIES[kind]
    fields, reasons = read_entries(given, ENTRIES[family])
    default = ENTRIES[family]["text_config.hidden_act"].default
    activations = [given.get(f"{part}.hidden_act", default) for part in PARTS]
    if activations[0] != activations[1]:
        reasons.append("the towers differ in `hidden_act`")
    if family == "SigLIP":
        fields["loss"] = "sigmoid"
        # SigLIP has no image projection.
        width = given.get("text_config.projection_size") or fields["text_width"]
        fields["projection"] = width
        if width != fields["image_width"]:
            reasons.append(
                f"text_config.projection_size={width} is not the width of images, "
                f"{fields['image_width']}"
            )
    elif not reasons:
        highest = fields["vocabulary"] - 1
        end = given.get("text_config.eos_token_id", 49407)
        if end not in (OLD_END_ID, highest):
            pools = f"keras_hub pools texts at the id {highest}"
            reasons.append(f"text_config.eos_token_id={end}: {pools}")
    return {**fields, "family": family}, reasons


def _read_preprocessing(folder, of_model):
    """Returns the fields of images, and why they are not supported.

    Args:
        folder: `pathlib.Path`.
        of_model: Dictionary, the fields of the config.
    """
    is_siglip = of_model["family"] == "SigLIP"
    paths = [folder / name for name in PREPROCESSING_FILES]
    path = next(filter(pathlib.Path.is_file, paths), None)
    config = {} if path is None else read_json(path)
    config = config.get("image_processor", config)
    # A flag of null is off. Any other null stands for the default.
    flags = "do_normalize", "do_rescale"
    given = {k: x for k, x in config.items() if x is not None or k in flags}
    if not given.get("do_normalize", True):
        given.update(image_mean=0.0, image_std=1.0)
    for key in ("image_mean", "image_std"):
        # transformers takes a number for all channels.
        if is_number(given.get(key)):
            given[key] = (given[key],) * 3
    mean, std = (SIGLIP_MEAN, SIGLIP_STD) if is_siglip else (CLIP_MEAN, CLIP_STD)
    entries = {
        "do_rescale": fixed(True),
        "image_mean": ConfigEntry("pixel_mean", mean, "mean of 3 channels"),
        "image_std": ConfigEntry("pixel_std", std, "deviation of 3 channels"),
    }
    fields, reasons = read_entries(given, entries)
    if abs(255 * given.get("rescale_factor", 1 / 255) - 1) > 1e-6:
        reasons.append("rescale_factor: pixels are not divided by 255")
    side = of_model["image_size"]
    size = given.get("size", side)
    has_height = isinstance(size, Mapping) and "height" in size
    fields["resize"] = "squash" if has_height or is_siglip else "crop"
    key = "crop_size" if given.get("do_center_crop", not is_siglip) else "size"
    if not _is_side(given.get(key, side), side):
        reasons.append(f"{key}={given[key]} is not the image size {side}")
    elif not _is_side(size, side):
        # A margin is cropped.
        fields["resize"] = f"size={size}"
    return fields, [f"{path.name}: {reason}" for reason in reasons]


def _is_side(size, side):
    """Returns whether a size of an image processor has no other numbers than a side."""
    values = size.values() if isinstance(size, Mapping) else np.ravel(size)
    return all(value == side for value in values)
