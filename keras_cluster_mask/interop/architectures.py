"""What a config says of a model of two transformers, beside its weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_cluster_mask.models.encoders import write_text_epsilon
from keras_cluster_mask.models.pixels import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.models.sizes import image_shape, make_clip

# Of all normalisations of a CLIP. keras_hub has 1e-6 in the last one of the text tower.
CLIP_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model's shape, activation and preprocessing.

    Attributes:
        sizes: Dictionary, the axes' sizes as `state_dicts.match` names them.
        heads: Pair of integers, of the image and the text tower.
        activation: String, keras_hub's name of it.
        image_size: Integer, the side of an image in pixels.
        pixel_mean: Three floats, by channel.
        pixel_std: Three floats, by channel.
    """

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

    def make_clip(self, dtype: Any = None) -> Any:
        """A `keras_hub.models.CLIPBackbone` with fresh weights."""
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
        )
        write_text_epsilon(backbone, CLIP_EPSILON)
        return backbone

    def make_siglip(self, dtype: Any = None) -> Any:
        """A `keras_hub.models.SigLIPBackbone` with fresh weights."""
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


def square(size: Any) -> int | None:
    """One integer from `n` or from `[n, n]`; `None` if it is neither."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if is_positive(size) else None


def is_positive(number: Any) -> bool:
    """Whether it is an integer above 0."""
    return isinstance(number, int) and not isinstance(number, bool) and number > 0
