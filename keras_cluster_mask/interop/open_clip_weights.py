"""CLIP models from and to weights of open_clip."""

import math
import os
from typing import Any

import numpy as np
from keras import ops

from keras_cluster_mask.interop.state_dicts import entries, match, read_state_dict
from keras_cluster_mask.interop.weight_files import write_weights
from keras_cluster_mask.models.encoders import write_text_epsilon
from keras_cluster_mask.models.sizes import make_clip

# Heads of open_clip's transformers are 64 wide, except for image towers wider than 1024
# (ViT-H, ViT-g, ViT-bigG, ViT-e), which have 16 heads all the same.
HEAD_WIDTH, MAX_IMAGE_HEADS = 64, 16

# Of all normalisations. keras_hub has 1e-6 in the last one of the text tower.
EPSILON = 1e-5


def load_open_clip(
    source: Any,
    activation: str = "gelu",
    num_heads: int | tuple[int, int] | None = None,
    dtype: Any = None,
) -> Any:
    """Loads a CLIP model from the weights of an open_clip checkpoint.

    Widths, depths, patch size, image size, context length and vocabulary follow from
    the shapes of the tensors. Everything else is that of open_clip's plain `ViT-*`
    models: pooling at the class token and at the end-of-text token (the highest id), a
    causal text tower, epsilons of 1e-5. Weights of half precision become float32.

    keras_hub cannot save the epsilon of the text tower's last normalisation. A saved
    `ContrastiveModel` keeps it. A backbone or a tower that is saved by itself is loaded
    with keras_hub's 1e-6, which changes embeddings by about 1e-6.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    kcm.interop.save_open_clip(backbone, "clip.safetensors")
    backbone = kcm.interop.load_open_clip("clip.safetensors", num_heads=3)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    ```

    Args:
        source: Path of a checkpoint, `.safetensors` (read without torch), `.pt`, `.pth`
            or `.bin`; or a state dict, a dictionary from name to array or tensor. Both
            may hold the state dict under `"state_dict"`, as open_clip's training
            writes it, with the prefixes of `DistributedDataParallel` (`module.`) or of
            `CustomTextCLIP` (`text.`).
        activation: `"gelu"`; `"quick_gelu"` for OpenAI's weights and all others of
            open_clip's models named `-quickgelu`. A checkpoint does not say which, and
            the wrong one gives somewhat worse embeddings.
        num_heads: Integer, or a pair for the image and the text tower. Defaults to
            those of open_clip's models of the same widths: one for every 64 features,
            and 16 in image towers wider than 1024.
        dtype: A dtype policy for the computations, such as `"mixed_bfloat16"`.

    Returns:
        A `keras_hub.models.CLIPBackbone`.

    Raises:
        ValueError: If the file cannot be read or holds Python code; or if it holds
            another model, with a list of all entries that are missing, unexpected (such
            as the `logit_bias` of a sigmoid loss, which a `CLIPBackbone` lacks), of a
            wrong shape, or not finite.
        FileNotFoundError: If the file does not exist.
        ImportError: If a file other than `.safetensors` is read without torch.

    Reference:
        - [open_clip](https://github.com/mlfoundations/open_clip), `CLIP` in `model.py`.
    """
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(
            "`activation` must be 'gelu' or 'quick_gelu'. "
            f"Received: activation={activation!r}"
        )
    found, sizes = match(*read_state_dict(source))
    side = math.isqrt(sizes["positions"] - 1)
    if side**2 + 1 != sizes["positions"]:
        raise ValueError(
            "`source` must be for square images: `visual.positional_embedding` holds "
            "one position for the class token and a square number for patches. "
            f"Received: {sizes['positions']} positions"
        )
    heads = _heads(num_heads, sizes["image_width"], sizes["text_width"])
    towers = {
        tower: [sizes[f"{tower}_{x}"] for x in ("width", "layers")]
        + [number, sizes[f"{tower}_hidden"]]
        for tower, number in zip(("image", "text"), heads)
    }
    backbone = make_clip(
        {**towers, "patch": sizes["patch"], "projection": sizes["projection"]},
        image_size=side * sizes["patch"],
        vocabulary_size=sizes["vocabulary"],
        context_length=sizes["context"],
        activation=activation,
        dtype=dtype,
    )
    write_text_epsilon(backbone, EPSILON)
    for entry, array in found:
        entry.write(backbone, array)
    return backbone


def open_clip_state_dict(model: Any) -> dict[str, np.ndarray]:
    """Returns the weights of a CLIP model under open_clip's names.

    Convert the arrays to tensors for `load_state_dict` of a model of open_clip. A state
    dict holds neither heads nor activation, so that model must have the same: heads of
    width 64, unless its config says otherwise, and `quick_gelu=True` for a backbone
    with `"quick_gelu"`. All its epsilons are 1e-5; in a backbone that is not from
    `load_open_clip` the text tower's last one is 1e-6.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    weights = kcm.interop.open_clip_state_dict(backbone)
    weights["visual.conv1.weight"].shape  # (96, 3, 8, 8)
    ```

    Args:
        model: A `keras_hub.models.CLIPBackbone`, or a `ContrastiveModel` made of one by
            `from_clip`. The bias of its sigmoid loss, if it has one, becomes
            `logit_bias`, which open_clip knows too (`init_logit_bias`).

    Returns:
        A dictionary from name to float32 NumPy array, a copy of the weight.

    Raises:
        ValueError: For another model; or for a backbone made by keras_hub itself whose
            patches all have position 0, which open_clip cannot represent.
    """
    # Imported here, as keras_hub takes seconds.
    import keras_hub

    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, keras_hub.models.CLIPBackbone):
        raise ValueError(
            "`model` must be a keras_hub CLIPBackbone, or a ContrastiveModel made by "
            f"`from_clip`. Received: model={model} of type {type(model).__name__}"
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
    table = entries(*(tower.num_layers for tower in towers))
    weights = {entry.name: entry.read(backbone) for entry in table}
    head = getattr(model, "head", None)
    if head is not None and head.logit_bias is not None:
        bias = ops.convert_to_numpy(head.logit_bias)
        weights["logit_bias"] = np.array(bias, "float32")
    return weights


def save_open_clip(model: Any, path: str | os.PathLike) -> None:
    """Writes the weights of a CLIP model to a file that open_clip reads.

    The file is written under a temporary name and renamed once it is complete. See
    `open_clip_state_dict` for what a state dict does not hold.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    kcm.interop.save_open_clip(backbone, "clip.safetensors")
    ```

    A model of a size that open_clip has a config for is then loaded there with, for
    example, `open_clip.create_model("ViT-B-16", pretrained="clip.safetensors")`.

    Args:
        model: What `open_clip_state_dict` takes.
        path: str or path that ends in `.safetensors` (written without torch), or in
            `.pt`, `.pth` or `.bin`.

    Raises:
        ValueError: For another model or another file extension.
        ImportError: If a file other than `.safetensors` is written without torch.
    """
    write_weights(path, open_clip_state_dict(model))


def _heads(num_heads, *widths):
    if num_heads is None:
        image, text = (width // HEAD_WIDTH for width in widths)
        num_heads = min(image, MAX_IMAGE_HEADS), text
    pair = num_heads if isinstance(num_heads, (tuple, list)) else (num_heads,) * 2
    if len(pair) != 2 or not all(map(_divides, pair, widths)):
        raise ValueError(
            "`num_heads` must be an integer, or a pair for the image and the text "
            "tower, that divides the towers' widths. "
            f"Received: num_heads={num_heads}, widths {widths}"
        )
    return pair


def _divides(heads, width):
    return isinstance(heads, int) and heads > 0 and width % heads == 0
