"""What a config says of a model of two transformers, beside its weights."""

import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from keras_cluster_mask.models import ContrastiveModel
from keras_cluster_mask.models.encoders import image_shape_of, write_text_epsilon
from keras_cluster_mask.models.pixels import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.models.sizes import image_shape, make_clip

# Of all normalisations of a CLIP. keras_hub has 1e-6 in the last one of the text tower.
CLIP_EPSILON = 1e-5

# Those that open_clip has, too.
ACTIVATIONS = "gelu", "quick_gelu"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model's shape, activation and preprocessing.

    Attributes:
        kind: `"clip"`, `"metaclip_2"` or `"siglip"`.
        sizes: Dictionary, the axes' sizes as `state_dicts.match` names them.
        heads: Pair of integers, of the image and the text tower.
        activation: String, keras_hub's name of it.
        image_size: Integer, the side of an image in pixels.
        pixel_mean: Three floats, by channel.
        pixel_std: Three floats, by channel.
    """

    kind: str
    sizes: Mapping[str, int]
    heads: tuple[int, int]
    activation: str
    image_size: int
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD

    def tower(self, name: str) -> tuple[int, int, int, int]:
        """Width, number of blocks, heads and hidden width of a tower."""
        width, layers, hidden = (
            self.sizes[f"{name}_{x}"] for x in ("width", "layers", "hidden")
        )
        return width, layers, dict(zip(("image", "text"), self.heads))[name], hidden

    def make(self, dtype: Any = None) -> Any:
        """A keras_hub backbone with fresh weights."""
        if self.kind == "siglip":
            return self._make_siglip(dtype)
        backbone = make_clip(
            {
                "image": self.tower("image"),
                "text": self.tower("text"),
                "patch": self.sizes["patch"],
                "projection": self.sizes["projection"],
            },
            image_size=self.image_size,
            vocabulary_size=self.sizes["vocabulary"],
            context_length=self.sizes["context"],
            activation=self.activation,
            dtype=dtype,
            family="CLIP" if self.kind == "clip" else "MetaCLIP2",
        )
        write_text_epsilon(backbone, CLIP_EPSILON)
        return backbone

    def _make_siglip(self, dtype):
        # Imported here, as keras_hub takes seconds.
        import keras_hub

        def options(name):
            width, layers, heads, hidden = self.tower(name)
            return dict(
                hidden_dim=width,
                num_layers=layers,
                num_heads=heads,
                intermediate_dim=hidden,
                intermediate_activation=self.activation,
                dtype=dtype,
            )

        return keras_hub.models.SigLIPBackbone(
            vision_encoder=keras_hub.models.SigLIPVisionEncoder(
                patch_size=self.sizes["patch"],
                image_shape=image_shape(self.image_size),
                name="vision_encoder",
                **options("image"),
            ),
            text_encoder=keras_hub.models.SigLIPTextEncoder(
                vocabulary_size=self.sizes["vocabulary"],
                embedding_dim=self.sizes["text_width"],
                max_sequence_length=self.sizes["context"],
                projection_dim=self.sizes["projection"],
                name="text_encoder",
                **options("text"),
            ),
            dtype=dtype,
        )


def architecture_of_model(model: Any) -> Architecture:
    """The architecture of a CLIP or MetaCLIP 2 backbone, or of a model of one."""
    backbone = getattr(model, "backbone", model)
    image, text = backbone.vision_encoder, backbone.text_encoder
    activations = image.intermediate_activation, text.intermediate_activation
    if activations[0] not in ACTIVATIONS or activations[0] != activations[1]:
        raise ValueError(
            "`model` must have the same activation in both towers, 'gelu' or "
            f"'quick_gelu'. Received: activations {activations}"
        )
    sizes = {"projection": backbone.projection_dim, "patch": image.patch_size}
    for name, tower in (("image", image), ("text", text)):
        sizes[f"{name}_width"] = tower.hidden_dim
        sizes[f"{name}_layers"] = tower.num_layers
        sizes[f"{name}_hidden"] = tower.intermediate_dim
    sizes["vocabulary"] = text.vocabulary_size
    sizes["context"] = text.max_sequence_length
    # In the middle in either order of axes, as images are square.
    image_size = image_shape_of(image)[1]
    sizes["positions"] = (image_size // image.patch_size) ** 2 + 1
    mean, std = CLIP_MEAN, CLIP_STD
    if isinstance(model, ContrastiveModel):
        mean, std = model.pixel_mean, model.pixel_std
        if mean is None:
            # The encoder takes pixels of [0, 255], which open_clip scales to [0, 1].
            mean, std = (0.0,) * 3, (1 / 255,) * 3
    heads = image.num_heads, text.num_heads
    return Architecture(
        kind_of(backbone),
        sizes,
        heads,
        activations[0],
        image_size,
        tuple(map(float, mean)),
        tuple(map(float, std)),
    )


def kind_of(backbone: Any) -> str:
    """`"clip"` or `"metaclip_2"`, of a backbone that is either."""
    # By what only one of them has.
    return "metaclip_2" if hasattr(backbone, "metaclip_2_head") else "clip"


def square(size: Any) -> int | None:
    """One integer from `n` or from `[n, n]`; `None` if it is neither."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if is_positive(size) else None


def is_positive(number: Any) -> bool:
    """Whether it is an integer above 0."""
    return isinstance(number, int) and is_finite(number) and number > 0


def is_finite(number: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    # `math.isfinite` raises an error for an integer that no float can hold.
    return is_number and abs(number) <= sys.float_info.max


def reasons_of_pixels(where: str, mean: Any, std: Any) -> list[str]:
    """Why pixels cannot be normalised by a mean and a deviation, one text a reason.

    Args:
        where: String, what comes before the names `mean` and `std` in a text.
        mean: What must be three finite numbers, by channel.
        std: What must be three finite numbers above 0, by channel.
    """

    def is_right(values, lowest):
        is_list = isinstance(values, (list, tuple)) and len(values) == 3
        return is_list and all(is_finite(x) and x > lowest for x in values)

    found = []
    if not is_right(mean, -math.inf):
        found.append(f"{where}mean={mean!r} is not three finite numbers")
    if not is_right(std, 0):
        found.append(f"{where}std={std!r} is not three finite numbers above 0")
    return found


def warn_of_resizing(mode: str, interpolation: str) -> None:
    """Warns the caller's caller if images are not to be resized as by default.

    Args:
        mode: String, open_clip's name of how images become square.
        interpolation: String, the filter.
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
