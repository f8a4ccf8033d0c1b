"""Loads CLIP models from weights of open_clip, and saves them as such."""

import json
import os
import pathlib
from typing import Any

import numpy as np
from keras import ops

from keras_cluster_mask.encoders.architecture import Architecture
from keras_cluster_mask.interop.open_clip_configs import (
    OPEN_CLIP_CONFIG_FILE,
    read_config,
    write_config,
)
from keras_cluster_mask.interop.state_dicts import entries, load_model
from keras_cluster_mask.interop.tensor_names import OPEN_CLIP, OPEN_METACLIP_2
from keras_cluster_mask.interop.weight_files import find_weights, write_weights
from keras_cluster_mask.models import ContrastiveModel

NAMES = {"CLIP": OPEN_CLIP, "MetaCLIP2": OPEN_METACLIP_2}

# The files that open_clip writes into a folder.
WEIGHT_FILES = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"


def load_open_clip(
    source: Any, config: Any = None, *, dtype: Any = None, **kwargs: Any
) -> ContrastiveModel:
    """Loads a CLIP model from the weights of an open_clip checkpoint.

    Weights do not fully determine a model: attention heads, activation, pooling and the
    mean and standard deviation of pixels are in its config. Models that keras_hub's
    `CLIPBackbone` and `MetaCLIP2Backbone` cannot compute are refused with the reasons.
    Of the 144 configs of open_clip 3.3.0, 36 are supported: the plain `ViT-*` models,
    and 5 of the 7 MetaCLIP 2 models (`*-worldwide*`). The others have towers of timm or
    transformers, are ResNets or CoCa, or are ViTs with average pooling (CLIPA), with
    layer scale, or with another end token (`ViT-L-14-worldwide*`). Half-precision
    weights become float32.

    The config also states how images were resized, and the model resizes them in the
    same way. A warning is issued for anything except a center crop and squashed images.

    keras_hub cannot save the epsilon of the text tower's last normalization. A saved
    `ContrastiveModel` keeps it. A backbone or a tower that is saved by itself is loaded
    with keras_hub's 1e-6, which changes embeddings by about 1e-6.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    kcm.interop.save_open_clip(backbone, "clip.safetensors")
    model = kcm.interop.load_open_clip("clip.safetensors")
    model.backbone.vision_encoder.num_heads  # 3
    ```

    Args:
        source: Path of a checkpoint, `.safetensors` (read without torch), `.pt`, `.pth`
            or `.bin`; or of a folder with `open_clip_model.safetensors` or
            `open_clip_pytorch_model.bin`; or a state dict, a dictionary from name to
            array or tensor. Files and dictionaries may hold the state dict under
            `"state_dict"`, as open_clip's training writes it, or `"model"`, with the
            prefixes of `DistributedDataParallel` (`module.`), `torch.compile`
            (`_orig_mod.`) or `CustomTextCLIP` (`text.`).
        config: The name of a config in the installed open_clip
            (`"ViT-B-32-quickgelu"`), the path of an `open_clip_config.json`, or such a
            dictionary. Defaults to the config that `save_open_clip` wrote with the
            file. For the two file names above, it is the folder's
            `open_clip_config.json`; files with other names do not use this config,
            which may belong to another model. A named config does not state the mean
            and deviation of pixels: pass `pixel_mean` and `pixel_std` for weights that
            were not trained with CLIP's. OpenAI's weights need the names that end in
            `-quickgelu`.
        dtype: A dtype policy for the computations, such as `"mixed_bfloat16"`.
        **kwargs: Arguments of `ContrastiveModel.from_backbone`, such as `masking`.
            `tokenizer` defaults to CLIP's, from `vocab.json` and `merges.txt` in the
            folder of the file or from the installed open_clip; to the files of Hugging
            Face in that folder, if the config specifies its tokenizer; or to `None`
            if there are none. Arguments take precedence over the config, which sets the
            defaults of `pixel_mean` and `pixel_std`. `loss` defaults to `"sigmoid"` for
            weights with a `logit_bias`, which is loaded; `loss="softmax"` drops it.

    Returns:
        A `ContrastiveModel`. Its `backbone` is a `keras_hub.models.CLIPBackbone`, or a
        `MetaCLIP2Backbone` if the config pools texts at the id of the end token.

    Raises:
        ValueError: If the file cannot be read or contains Python code; if the config
            describes a model that keras_hub does not support; or if the weights do not
            match it, with a list of all entries that are missing, unexpected, of a
            wrong shape, or not finite.
        FileNotFoundError: If a file does not exist.
        ImportError: If a `.safetensors` file is read without safetensors, or another
            one without torch; or if a config is given by name without open_clip.

    Reference:
        - [open_clip](https://github.com/mlfoundations/open_clip), `CLIP` in `model.py`.
    """
    source = find_weights(source, WEIGHT_FILES)
    if config is None and isinstance(source, pathlib.Path):
        beside = _config_path(source)
        config = beside if beside.is_file() else None
    if config is None:
        raise ValueError(
            "`config` must be the name of an open_clip config, such as 'ViT-B-32', or "
            f"the path of an {OPEN_CLIP_CONFIG_FILE}, because weights alone do not "
            "define the number of attention heads or the activation. Received: "
            "config=None"
        )
    architecture = read_config(config)
    return load_model(source, NAMES[architecture.family], architecture, dtype, kwargs)


def open_clip_state_dict(model: Any) -> dict[str, np.ndarray]:
    """Returns the weights of a CLIP model under open_clip's names.

    Convert the arrays to tensors for `load_state_dict` of an open_clip model. A state
    dict contains neither the number of heads nor the activation, which `save_open_clip`
    also writes. All epsilons of open_clip are 1e-5; in a backbone that is not from
    `load_open_clip`, the text tower's last one is 1e-6.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    weights = kcm.interop.open_clip_state_dict(backbone)
    weights["visual.conv1.weight"].shape  # (96, 3, 8, 8)
    ```

    Args:
        model: A `keras_hub.models.CLIPBackbone` or `MetaCLIP2Backbone`, or a
            `ContrastiveModel` of one. The bias of its sigmoid loss, if it has one,
            becomes `logit_bias`, which open_clip supports too (`init_logit_bias`).

    Returns:
        A dictionary from name to float32 NumPy array, a copy of the weight.

    Raises:
        ValueError: For an unsupported model, or for a backbone made by keras_hub itself
            with all patches at position 0, which open_clip cannot represent.
    """
    backbone = getattr(model, "backbone", model)
    if not any(hasattr(backbone, x) for x in ("clip_head", "metaclip_2_head")):
        raise ValueError(
            "`model` must be a keras_hub CLIPBackbone or MetaCLIP2Backbone, or a "
            f"ContrastiveModel of one. Received: model={model} of type "
            f"{type(model).__name__}"
        )
    ids = ops.convert_to_numpy(backbone.vision_encoder.embedding.position_ids)[0]
    if not np.array_equal(ids, np.arange(len(ids))):
        raise ValueError(
            "`model` must have a different position id for each patch. In a new "
            "keras_hub CLIPBackbone, all position ids are 0 until a checkpoint is "
            "loaded or `ContrastiveModel.from_backbone` sets them. Received: position "
            f"ids {ids[:4].tolist()} and so on"
        )
    architecture = Architecture.of(model)
    has_bias = architecture.loss == "sigmoid"
    table = entries(NAMES[architecture.family], backbone, has_bias)
    return {entry.name: entry.read(model) for entry in table}


def save_open_clip(model: Any, path: str | os.PathLike) -> None:
    """Writes the weights of a CLIP model and its config to files that open_clip reads.

    The config states what the weights do not: attention heads, activation, the mean and
    deviation of pixels, and how images are resized. It is written to a file next to the
    weights: `open_clip_config.json` for the name that open_clip reads,
    `open_clip_model.safetensors`, and otherwise one named after the weights, such as
    `clip.safetensors.open_clip_config.json`. So a folder can hold several models.
    Existing files are replaced.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    kcm.interop.save_open_clip(model, "clip/open_clip_model.safetensors")
    ```

    open_clip then loads the folder: `open_clip.create_model("local-dir:clip")`. For a
    MetaCLIP 2, put the files of its tokenizer, `facebook/xlm-v-base`, in the folder.

    Args:
        model: A model that `open_clip_state_dict` takes. A backbone by itself is saved
            with the mean and deviation of CLIP.
        path: str or path that ends in `.safetensors`.

    Raises:
        ValueError: For an unsupported model or file extension.
        ImportError: If safetensors is not installed.
    """
    weights = open_clip_state_dict(model)
    config = write_config(Architecture.of(model), weights.get("logit_bias"))
    path = pathlib.Path(path).expanduser()
    write_weights(path, weights)
    _config_path(path).write_text(json.dumps(config, indent=2))


def _config_path(path):
    """Returns the path of the config that belongs to a file of weights."""
    # With any other name of the weights, the folder may hold several models.
    prefix = "" if path.name in WEIGHT_FILES else f"{path.name}."
    return path.with_name(f"{prefix}{OPEN_CLIP_CONFIG_FILE}")
