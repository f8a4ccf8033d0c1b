"""CLIP models from and to weights of open_clip."""

import json
import math
import os
import pathlib
from typing import Any

import numpy as np
from keras import ops

from keras_cluster_mask.distribution.tensorflow_import import import_keras_hub
from keras_cluster_mask.interop.architectures import (
    ACTIVATIONS,
    Architecture,
    Tower,
    architecture_of_model,
    is_positive,
    kind_of,
    warn_of_resizing,
)
from keras_cluster_mask.interop.open_clip_configs import (
    OPEN_CLIP_CONFIG_FILE,
    architecture_of,
    config_of,
    read_config,
    resizing_of,
)
from keras_cluster_mask.interop.state_dicts import (
    as_float32,
    entries,
    match,
    read_state_dict,
)
from keras_cluster_mask.interop.tensor_names import OPEN_CLIP, OPEN_METACLIP_2
from keras_cluster_mask.interop.weight_files import (
    find_weights,
    read_metadata,
    write_text,
    write_weights,
)
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.models import ContrastiveModel

NAMES = {"clip": OPEN_CLIP, "metaclip_2": OPEN_METACLIP_2}

# The files that open_clip writes into a folder.
WEIGHT_FILES = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"

# Under which a file of safetensors holds its config.
METADATA = "open_clip_config"

# Heads of open_clip's transformers are 64 wide, except for image towers wider than 1024
# (ViT-H, ViT-g, ViT-bigG, ViT-e), which have 16 heads all the same.
HEAD_WIDTH, MAX_IMAGE_HEADS = 64, 16


def load_open_clip(
    source: Any,
    config: Any = None,
    *,
    activation: str | None = None,
    num_heads: int | tuple[int, int] | None = None,
    dtype: Any = None,
    masking: PatchMasking | None = None,
    **kwargs: Any,
) -> ContrastiveModel:
    """Loads a CLIP model from the weights of an open_clip checkpoint.

    Weights alone do not say how they are used: attention heads, activation, pooling and
    the mean and deviation of pixels are in the model's config. What keras_hub's
    `CLIPBackbone` and `MetaCLIP2Backbone` cannot compute is refused with the reason. Of
    the 144 configs of open_clip 3.3.0, 36 are loaded: the plain `ViT-*` models, and 5
    of the 7 of MetaCLIP 2 (`*-worldwide*`). The others have towers of timm or
    transformers, are ResNets or CoCa, or are ViTs with average pooling (CLIPA), with
    layer scales, or with another end token (`ViT-L-14-worldwide*`). Weights of half
    precision become float32.

    The config also states how images were resized. Resize them this way in the dataset.
    A warning is issued for anything but a center crop with bicubic interpolation.

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
            `"state_dict"`, as open_clip's training writes it, with the prefixes of
            `DistributedDataParallel` (`module.`) or of `CustomTextCLIP` (`text.`).
        config: The name of a config of the installed open_clip
            (`"ViT-B-32-quickgelu"`), the path of an `open_clip_config.json`, or such a
            dictionary. Defaults to the config that `save_open_clip` has written with
            the file. For the two names of files above it is the folder's
            `open_clip_config.json`; files of other names do not use that one, which may
            be of another model. A named config says nothing of pixels: pass
            `pixel_mean` and `pixel_std` for weights that were not trained with CLIP's.
            OpenAI's weights need the names in `-quickgelu`.
        activation: `"gelu"` or `"quick_gelu"`. Required without a config, and not
            allowed with one.
        num_heads: Integer, or a pair for the image and the text tower. Only without any
            config. Defaults to one for every 64 features, and to 16 in image towers
            wider than 1024, as in open_clip's own models.
        dtype: A dtype policy for the computations, such as `"mixed_bfloat16"`.
        masking: A `PatchMasking` layer, or `None`.
        **kwargs: Arguments of `ContrastiveModel.from_backbone`, which take precedence.
            `pixel_mean` and `pixel_std` default to the config's. `loss` defaults to
            `"sigmoid"` for weights with a `logit_bias`, which is loaded;
            `loss="softmax"` leaves it out.

    Returns:
        A `ContrastiveModel`. Its `backbone` is a `keras_hub.models.CLIPBackbone`, or a
        `MetaCLIP2Backbone` if the config pools texts at the id of the end token.

    Raises:
        ValueError: If the file cannot be read or holds Python code; if the config
            describes a model that keras_hub cannot hold; or if the weights are
            of another model, with a list of all entries that are missing, unexpected,
            of a wrong shape, or not finite.
        FileNotFoundError: If a file does not exist.
        ImportError: If a file other than `.safetensors` is read without torch; or if a
            config is named without open_clip.

    Reference:
        - [open_clip](https://github.com/mlfoundations/open_clip), `CLIP` in `model.py`.
    """
    source = find_weights(source, WEIGHT_FILES)
    config = _config_of_file(source) if config is None else config
    architecture, needs_bias = None, False
    if config is not None:
        config, preprocessing, label = read_config(config)
        _check_only_without_config(label, activation, num_heads)
        architecture = architecture_of(config, preprocessing, label)
        needs_bias = config.get("init_logit_bias") is not None
        warn_of_resizing(*resizing_of(preprocessing))
    elif activation not in ACTIVATIONS:
        raise ValueError(
            "`activation` must be 'gelu', or 'quick_gelu' for OpenAI's weights and all "
            "others of models in '-quickgelu'; or pass `config`, such as the path of "
            f"an {OPEN_CLIP_CONFIG_FILE}, which says which. Weights do not. "
            f"Received: activation={activation!r}, config=None"
        )
    state, label = read_state_dict(source, OPEN_CLIP)
    bias = _pop_bias(state, needs_bias, label)
    if architecture is None:
        found, sizes = match(state, label, OPEN_CLIP)
        architecture = _guess(sizes, activation, num_heads)
    else:
        found, _ = match(state, label, NAMES[architecture.kind], architecture.sizes)
    backbone = architecture.make(dtype)
    for entry, array in found:
        entry.write(backbone, array)
    options = {
        "loss": "softmax" if bias is None else "sigmoid",
        "pixel_mean": architecture.pixel_mean,
        "pixel_std": architecture.pixel_std,
        **kwargs,
    }
    model = ContrastiveModel.from_backbone(backbone, masking=masking, **options)
    is_given = options.get("initial_logit_bias") is not None
    if bias is not None and model.head.logit_bias is not None and not is_given:
        model.head.logit_bias.assign(bias)
    return model


def open_clip_state_dict(model: Any) -> dict[str, np.ndarray]:
    """Returns the weights of a CLIP model under open_clip's names.

    Convert the arrays to tensors for `load_state_dict` of a model of open_clip. A state
    dict holds neither heads nor activation, which `save_open_clip` writes too. All
    epsilons of open_clip are 1e-5; in a backbone that is not from `load_open_clip` the
    text tower's last one is 1e-6.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    weights = kcm.interop.open_clip_state_dict(backbone)
    weights["visual.conv1.weight"].shape  # (96, 3, 8, 8)
    ```

    Args:
        model: A `keras_hub.models.CLIPBackbone` or `MetaCLIP2Backbone`, or a
            `ContrastiveModel` of one. The bias of its sigmoid loss, if it has one,
            becomes `logit_bias`, which open_clip knows too (`init_logit_bias`).

    Returns:
        A dictionary from name to float32 NumPy array, a copy of the weight.

    Raises:
        ValueError: For another model; or for a backbone made by keras_hub itself whose
            patches all have position 0, which open_clip cannot represent.
    """
    # Imported here, as keras_hub takes seconds.
    keras_hub = import_keras_hub()
    backbone = getattr(model, "backbone", model)
    kinds = keras_hub.models.CLIPBackbone, keras_hub.models.MetaCLIP2Backbone
    if not isinstance(backbone, kinds):
        raise ValueError(
            "`model` must be a keras_hub CLIPBackbone or MetaCLIP2Backbone, or a "
            f"ContrastiveModel of one. Received: model={model} of type "
            f"{type(model).__name__}"
        )
    ids = ops.convert_to_numpy(backbone.vision_encoder.embedding.position_ids)[0]
    if not np.array_equal(ids, np.arange(len(ids))):
        raise ValueError(
            "`model` must have a different position for each patch. In a CLIPBackbone "
            "made by keras_hub they are 0 until a checkpoint is loaded or "
            "`ContrastiveModel.from_clip` numbers them. "
            f"Received: position ids {ids[:4].tolist()} and so on"
        )
    towers = backbone.vision_encoder, backbone.text_encoder
    table = entries(NAMES[kind_of(backbone)], *(tower.num_layers for tower in towers))
    weights = {entry.name: entry.read(backbone) for entry in table}
    head = getattr(model, "head", None)
    if head is not None and head.logit_bias is not None:
        bias = ops.convert_to_numpy(head.logit_bias)
        weights["logit_bias"] = np.array(bias, "float32")
    return weights


def save_open_clip(model: Any, path: str | os.PathLike) -> None:
    """Writes the weights of a CLIP model and its config to files that open_clip reads.

    The config has what weights do not say: attention heads, activation, and the mean
    and deviation of pixels. It is written into a file of safetensors, and into a file
    beside the weights: `open_clip_config.json` for the names that open_clip reads,
    `open_clip_model.safetensors` and `open_clip_pytorch_model.bin`, and otherwise one
    named after the weights, such as `clip.pt.open_clip_config.json`. So a folder can
    hold several models. The file of weights is written under a temporary name and
    renamed once it is complete.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    kcm.interop.save_open_clip(model, "clip/open_clip_model.safetensors")
    ```

    open_clip then loads the folder: `open_clip.create_model("local-dir:clip")`.

    Args:
        model: What `open_clip_state_dict` takes. A backbone by itself has the mean and
            deviation of CLIP.
        path: str or path that ends in `.safetensors` (written without torch), or in
            `.pt`, `.pth` or `.bin`.

    Raises:
        ValueError: For another model or another file extension; or if the
            `open_clip_config.json` to write exists and is of another model.
        ImportError: If a file other than `.safetensors` is written without torch.
    """
    weights = open_clip_state_dict(model)
    bias = weights.get("logit_bias")
    config = config_of(
        architecture_of_model(model), None if bias is None else float(bias)
    )
    path = pathlib.Path(path).expanduser()
    beside = _config_path(path)
    # It may be of other weights in the folder, and say more than what is written here.
    is_kept = path.name in WEIGHT_FILES and beside.exists()
    if is_kept:
        _check_same(beside, config)
    text = json.dumps(config, indent=2)
    write_weights(path, weights, {"format": "pt", METADATA: text})
    if not is_kept:
        write_text(beside, text)


def _config_path(path):
    """The path of the file that holds the config of a file of weights."""
    # Any other name could be that of another model's weights in the same folder.
    prefix = "" if path.name in WEIGHT_FILES else f"{path.name}."
    return path.with_name(f"{prefix}{OPEN_CLIP_CONFIG_FILE}")


def _config_of_file(source):
    """What `config` is of a file that says so itself, or `None`."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    text = read_metadata(source).get(METADATA)
    if text is not None:
        return json.loads(text)
    beside = _config_path(pathlib.Path(source).expanduser())
    return beside if beside.is_file() else None


def _check_only_without_config(label, activation, num_heads):
    for name, value in (("activation", activation), ("num_heads", num_heads)):
        if value is not None:
            raise ValueError(
                f"`{name}` is only for weights without a config. It follows from the "
                "config, which is in the file, beside it or in `config`; pass a "
                f"changed one as `config`. Received: {name}={value!r}, with {label}"
            )


def _pop_bias(state, is_needed, label):
    """Takes the bias of a sigmoid loss out of a state dict, which may have none."""
    bias = state.pop("logit_bias", None)
    if bias is None:
        if is_needed:
            raise ValueError(
                "`source` must hold the `logit_bias` of the sigmoid loss, as "
                f"`init_logit_bias` in the config says. Received: {label}"
            )
        return None
    bias = as_float32(bias)
    if bias.shape != () or not np.isfinite(bias):
        raise ValueError(
            "`source` must hold one finite number as `logit_bias`. "
            f"Received: {label}, with logit_bias={bias}"
        )
    return bias


def _guess(sizes, activation, num_heads):
    """The architecture of weights without a config."""
    side = math.isqrt(sizes["positions"] - 1)
    if side**2 + 1 != sizes["positions"]:
        raise ValueError(
            "`source` must be for square images: `visual.positional_embedding` holds "
            "one position for the class token and a square number for patches. "
            f"Received: {sizes['positions']} positions"
        )
    heads = _heads(num_heads, sizes["image_width"], sizes["text_width"])
    towers = (
        Tower(sizes[f"{x}_width"], sizes[f"{x}_layers"], n, sizes[f"{x}_hidden"])
        for x, n in zip(("image", "text"), heads)
    )
    return Architecture(
        "clip",
        *towers,
        image_size=side * sizes["patch"],
        activation=activation,
        **{x: sizes[x] for x in ("patch", "vocabulary", "context", "projection")},
    )


def _check_same(path, config):
    """Checks that the config in a folder, which may say more, is of the same model."""

    def essence(config):
        model, preprocessing, label = read_config(config)
        has_bias = model.get("init_logit_bias") is not None
        return architecture_of(model, preprocessing, label), has_bias

    try:
        is_same = essence(path) == essence(config)
    except ValueError:
        is_same = False
    if not is_same:
        raise ValueError(
            f"`path` must not be beside the {OPEN_CLIP_CONFIG_FILE} of another model. "
            "Save under another name or into another folder, or delete that file if "
            "the weights there are no longer needed. "
            f"Received: path={str(path.parent)!r}"
        )


def _heads(num_heads, *widths):
    pair = num_heads if isinstance(num_heads, (tuple, list)) else (num_heads,) * 2
    if num_heads is None and not any(width % HEAD_WIDTH for width in widths):
        image, text = (width // HEAD_WIDTH for width in widths)
        pair = min(image, MAX_IMAGE_HEADS), text
    if len(pair) != 2 or not all(
        is_positive(n) and width % n == 0 for n, width in zip(pair, widths)
    ):
        raise ValueError(
            "`num_heads` must be an integer, or a pair for the image and the text "
            "tower, that divides the towers' widths, and must be given for widths that "
            f"are no multiples of {HEAD_WIDTH}; or pass `config`, which says it. "
            f"Received: num_heads={num_heads}, widths {widths}"
        )
    return pair
