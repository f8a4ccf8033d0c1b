"""The architecture of a two-tower model, which its weights alone do not determine."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from keras_cluster_mask.checks import is_integer, is_number, is_positive
from keras_cluster_mask.models import ContrastiveModel
from keras_cluster_mask.models.encoders import image_shape_of, write_text_epsilon
from keras_cluster_mask.models.pixels import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.models.sizes import make_clip

# The epsilon of all layer normalizations of CLIP. keras_hub uses 1e-6 in the last one
# of the text tower.
CLIP_EPSILON = 1e-5

# The activations that open_clip has too.
ACTIVATIONS = "gelu", "quick_gelu"

# The prefixes of keras_hub's class names, by kind of model.
FAMILIES = {"clip": "CLIP", "metaclip_2": "MetaCLIP2", "siglip": "SigLIP"}


class Tower(NamedTuple):
    """The sizes of a transformer, as `models.sizes.make_clip` takes them."""

    width: int
    layers: int
    heads: int
    hidden: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape, activation and preprocessing of a model.

    Attributes:
        kind: Key of `FAMILIES`.
        image: `Tower`, the image tower.
        text: `Tower`, the text tower.
        patch: Integer, the side of a patch in pixels.
        image_size: Integer, the side of an image in pixels.
        vocabulary: Integer, the number of token ids.
        context: Integer, the maximum number of tokens per text.
        projection: Integer, the width of embeddings.
        activation: String, its name in keras_hub.
        pixel_mean: Three floats, by channel.
        pixel_std: Three floats, by channel.
    """

    kind: str
    image: Tower
    text: Tower
    patch: int
    image_size: int
    vocabulary: int
    context: int
    projection: int
    activation: str
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes of tensors, by their names in `state_dicts.match`."""
        names = "patch", "vocabulary", "context", "projection"
        sizes = {name: getattr(self, name) for name in names}
        # SigLIP has no class token.
        num_patches = (self.image_size // self.patch) ** 2
        sizes["positions"] = num_patches + (self.kind != "siglip")
        for name, tower in (("image", self.image), ("text", self.text)):
            of_tower = tower._asdict().items()
            sizes.update({f"{name}_{x}": size for x, size in of_tower if x != "heads"})
        return sizes

    def make(self, dtype: Any = None) -> Any:
        """Creates a keras_hub backbone with new weights."""
        lengths = self.image_size, self.vocabulary, self.context
        family = FAMILIES[self.kind]
        backbone = make_clip(vars(self), *lengths, self.activation, dtype, family)
        if self.kind != "siglip":
            write_text_epsilon(backbone, CLIP_EPSILON)
        return backbone


def architecture_of_model(model: Any) -> Architecture:
    """Returns the architecture of a CLIP or MetaCLIP 2 backbone, or of its model."""
    backbone = getattr(model, "backbone", model)
    image, text = backbone.vision_encoder, backbone.text_encoder
    activations = image.intermediate_activation, text.intermediate_activation
    if activations[0] not in ACTIVATIONS or activations[0] != activations[1]:
        raise ValueError(
            "`model` must have the same activation in both towers, 'gelu' or "
            f"'quick_gelu'. Received: activations {activations}"
        )
    mean, std = CLIP_MEAN, CLIP_STD
    if isinstance(model, ContrastiveModel):
        mean, std = model.pixel_mean, model.pixel_std
        if mean is None:
            # The encoder takes pixels of [0, 255], which open_clip scales to [0, 1].
            mean, std = (0.0,) * 3, (1 / 255,) * 3
    towers = (
        Tower(x.hidden_dim, x.num_layers, x.num_heads, x.intermediate_dim)
        for x in (image, text)
    )
    return Architecture(
        kind_of(backbone),
        *towers,
        patch=image.patch_size,
        # The second axis is a side in both data formats, and images are square.
        image_size=image_shape_of(image)[1],
        vocabulary=text.vocabulary_size,
        context=text.max_sequence_length,
        projection=backbone.projection_dim,
        activation=activations[0],
        pixel_mean=tuple(map(float, mean)),
        pixel_std=tuple(map(float, std)),
    )


def kind_of(backbone: Any) -> str:
    """Returns `"clip"` or `"metaclip_2"` for a backbone of either kind."""
    # Only MetaCLIP 2 has this attribute.
    return "metaclip_2" if hasattr(backbone, "metaclip_2_head") else "clip"


def square(size: Any) -> int | None:
    """Returns one integer for `n` or `[n, n]`; `None` for anything else."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if is_integer(size) and size > 0 else None


def reasons_of_sizes(
    where: str, config: Mapping, keys: Iterable[str], divisor: str, width: str
) -> list[str]:
    """Lists why the sizes in a config cannot be those of a tower, one text per reason.

    Args:
        where: String, the name of the config.
        config: Dictionary.
        keys: The keys of sizes.
        divisor: The key of the size that must divide the width.
        width: The key of the width.
    """
    found = []
    for key in keys:
        value, kind = config[key], "positive integer"
        is_right = is_integer(value) and value > 0
        if key in ("patch_size", "image_size"):
            is_right, kind = square(value) is not None, "size of a square"
        elif key == "mlp_ratio":
            is_right, kind = is_positive(value), "positive number"
        if not is_right:
            found.append(f"{where}.{key}={value!r} is no {kind}")
    if not found and config[width] % config[divisor]:
        found.append(
            f"{where}.{divisor}={config[divisor]} does not divide the width "
            f"{config[width]}"
        )
    return found


def reasons_of_pixels(where: str, mean: Any, std: Any) -> list[str]:
    """Lists why a mean and a deviation cannot normalize pixels, one text per reason.

    Args:
        where: String, the text before the names `mean` and `std` in a reason.
        mean: The value to check; valid are three finite numbers, by channel.
        std: The value to check; valid are three finite numbers above 0, by channel.
    """
    found = []
    if not _is_of_channels(mean):
        found.append(f"{where}mean={mean!r} is not three finite numbers")
    if not _is_of_channels(std) or min(std) <= 0:
        found.append(f"{where}std={std!r} is not three finite numbers above 0")
    return found


def _is_of_channels(values):
    is_list = isinstance(values, (list, tuple)) and len(values) == 3
    return is_list and all(is_number(x) and math.isfinite(x) for x in values)


def warn_of_resizing(mode: str, interpolation: str) -> None:
    """Warns the caller's caller if images need a resizing other than the default.

    Args:
        mode: String, open_clip's name for the way in which images become square.
        interpolation: String, the interpolation filter.
    """
    if mode != "shortest":
        remedy = "Pass resize='squash' to `image_text_dataset`."
        if mode != "squash":
            remedy = "`image_text_dataset` cannot do that."
        warnings.warn(
            f"The model was trained on images resized by {mode!r}, not by a center "
            f"crop. {remedy}",
            stacklevel=3,
        )
    if interpolation != "bicubic":
        warnings.warn(
            f"The model was trained on images resized by {interpolation!r} "
            "interpolation. `image_text_dataset` resizes by bicubic interpolation.",
            stacklevel=3,
        )
