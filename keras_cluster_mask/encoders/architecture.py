"""The architecture of a CLIP, which its weights do not fully determine."""

import dataclasses
from typing import Any, Self

import keras

from keras_cluster_mask.checks import check_choice
from keras_cluster_mask.distribution.backends import import_keras_hub
from keras_cluster_mask.encoders.families import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.encoders.surgery import image_shape_of, number_positions
from keras_cluster_mask.masking.patch_grid import is_channels_first

# The fields of a tower, without their prefix, and the arguments of keras_hub's
# encoders.
TOWER = {
    "width": "hidden_dim",
    "layers": "num_layers",
    "heads": "num_heads",
    "hidden": "intermediate_dim",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes, activation, pooling and preprocessing of a two-tower model.

    Every format of a model is read into this class and written from it: the sizes of
    `clip_backbone`, keras_hub's backbones, and the configs of open_clip and
    transformers.

    Attributes:
        image_width: Integer, the width of the image tower's tokens.
        image_layers: Integer, its number of transformer blocks.
        image_heads: Integer, its number of attention heads.
        image_hidden: Integer, the width within its feed-forward layers.
        text_width: As `image_width`, for the text tower, like the next three.
        text_layers: Integer.
        text_heads: Integer.
        text_hidden: Integer.
        patch: Integer, the side of a patch in pixels.
        projection: Integer, the width of embeddings.
        image_size: Integer, the side of an image in pixels.
        vocabulary: Integer, the number of token ids.
        context: Integer, the maximum number of tokens per text.
        activation: String, its name in keras_hub.
        family: The prefix of keras_hub's class names, which
            also determines the pooling of images and texts.
        loss: `"softmax"`, or `"sigmoid"` for a model with a bias of the logits.
        pixel_mean: Three floats, by channel.
        pixel_std: Three floats, by channel.
        resize: String, see `ContrastiveModel`; or the name of another way in which
            images became square.
        tokenizer: `"clip"` for OpenAI's, `"hugging_face"` for one that Hugging Face's
            library reads, or `None` if it is not known.
    """

    image_width: int
    image_layers: int
    image_heads: int
    image_hidden: int
    text_width: int
    text_layers: int
    text_heads: int
    text_hidden: int
    patch: int
    projection: int
    image_size: int = 224
    vocabulary: int = 49408
    context: int = 77
    activation: str = "gelu"
    family: str = "CLIP"
    loss: str = "softmax"
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD
    resize: str = "crop"
    tokenizer: str | None = None

    @classmethod
    def of(cls, model: Any) -> Self:
        """Returns the architecture of a CLIP or MetaCLIP 2 backbone, or of its model.

        Args:
            model: A backbone, or a `ContrastiveModel` of one. A backbone has
                the preprocessing of CLIP and a softmax loss.
        """
        backbone = getattr(model, "backbone", model)
        image, text = backbone.vision_encoder, backbone.text_encoder
        activations = image.intermediate_activation, text.intermediate_activation
        if activations[0] != activations[1]:
            raise ValueError(
                "`model` must have the same activation in both towers. "
                f"Received: activations {activations}"
            )
        mean = getattr(model, "pixel_mean", CLIP_MEAN)
        std = getattr(model, "pixel_std", CLIP_STD)
        if mean is None:
            # The encoder takes pixels of [0, 255], which open_clip scales to [0, 1].
            mean, std = (0.0,) * 3, (1 / 255,) * 3
        bias = getattr(getattr(model, "head", None), "logit_bias", None)
        towers = {
            f"{name}_{ours}": getattr(encoder, theirs)
            for name, encoder in (("image", image), ("text", text))
            for ours, theirs in TOWER.items()
        }
        return cls(
            **towers,
            patch=image.patch_size,
            projection=backbone.projection_dim,
            # The second axis is a side in both data formats, and images are square.
            image_size=image_shape_of(image)[1],
            vocabulary=text.vocabulary_size,
            context=text.max_sequence_length,
            activation=activations[0],
            # Only MetaCLIP 2 has this attribute.
            family="MetaCLIP2" if hasattr(backbone, "metaclip_2_head") else "CLIP",
            loss="softmax" if bias is None else "sigmoid",
            pixel_mean=tuple(map(float, mean)),
            pixel_std=tuple(map(float, std)),
            resize=getattr(model, "resize", "crop"),
        )

    def make(self, dtype: Any = None) -> keras.Model:
        """Makes a keras_hub backbone with random weights."""
        # Imported here, because importing keras_hub takes seconds and other functions
        # do not need it.
        keras_hub = import_keras_hub()
        vision, text, backbone = (
            getattr(keras_hub.models, self.family + part)
            for part in ("VisionEncoder", "TextEncoder", "Backbone")
        )
        projection = {"projection_dim": self.projection}
        # SigLIP projects only texts, in the text tower.
        is_siglip = self.family == "SigLIP"
        of_text, of_both = (projection, {}) if is_siglip else ({}, projection)
        sides = self.image_size, self.image_size
        vision_encoder = vision(
            patch_size=self.patch,
            image_shape=(3, *sides) if is_channels_first() else (*sides, 3),
            name="vision_encoder",
            **self._tower("image"),
            dtype=dtype,
        )
        text_encoder = text(
            vocabulary_size=self.vocabulary,
            embedding_dim=self.text_width,
            max_sequence_length=self.context,
            name="text_encoder",
            **of_text,
            **self._tower("text"),
            dtype=dtype,
        )
        number_positions(vision_encoder.embedding)
        return backbone(
            vision_encoder=vision_encoder,
            text_encoder=text_encoder,
            dtype=dtype,
            **of_both,
        )

    def _tower(self, name):
        sizes = {y: getattr(self, f"{name}_{x}") for x, y in TOWER.items()}
        return {**sizes, "intermediate_activation": self.activation}


# All sizes except "tiny" match open_clip's model configurations of the same names
# (https://github.com/mlfoundations/open_clip). The paper uses ViT-B/16. The first four
# numbers are for the image tower, the next four for the text tower.
SIZES = {
    "tiny": Architecture(96, 3, 3, 384, 96, 1, 3, 384, 8, 96),
    "vit_s_16": Architecture(384, 12, 6, 1536, 384, 12, 6, 1536, 16, 384),
    "vit_b_32": Architecture(768, 12, 12, 3072, 512, 12, 8, 2048, 32, 512),
    "vit_b_16": Architecture(768, 12, 12, 3072, 512, 12, 8, 2048, 16, 512),
    "vit_l_16": Architecture(1024, 24, 16, 4096, 768, 12, 12, 3072, 16, 768),
    "vit_l_14": Architecture(1024, 24, 16, 4096, 768, 12, 12, 3072, 14, 768),
}


def clip_backbone(
    size: str,
    image_size: int = 224,
    vocabulary_size: int = 49408,
    context_length: int = 77,
    patch_size: int | None = None,
    activation: str = "gelu",
    dtype: str | keras.DTypePolicy | None = None,
) -> keras.Model:
    """Makes a CLIP model of a given size, with random weights.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=4096)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    ```

    Args:
        size: `"tiny"` (for images of 32 to 64 pixels and small data),
            `"vit_s_16"`, `"vit_b_32"`, `"vit_b_16"`, `"vit_l_16"` or `"vit_l_14"`.
        image_size: Integer. The side of the square images in pixels.
        vocabulary_size: Integer. The tokenizer's number of ids; 49,408 for
            CLIP's vocabulary.
        context_length: Integer. The maximum number of tokens of a text.
        patch_size: Integer. Defaults to 8 for `"tiny"`, otherwise to the number in the
            name of the size.
        activation: `"gelu"`, or `"quick_gelu"` as in OpenAI's weights.
        dtype: A dtype policy for the computations, such as `"mixed_bfloat16"`.

    Returns:
        A `keras_hub.models.CLIPBackbone`.

    Raises:
        ValueError: For an unknown size, or if the patch size does not divide
            the image size.
    """
    architecture = dataclasses.replace(
        architecture_of_size(size, image_size, patch_size),
        vocabulary=vocabulary_size,
        context=context_length,
        activation=activation,
    )
    return architecture.make(dtype)


def architecture_of_size(
    size: str, image_size: int, patch_size: int | None
) -> Architecture:
    """Returns an entry of `SIZES` for images and patches of these sides."""
    check_choice("size", size, tuple(SIZES))
    patch_size = patch_size or SIZES[size].patch
    if image_size % patch_size:
        raise ValueError(
            "`image_size` must be divisible by the patch size. Received: "
            f"image_size={image_size}, patch_size={patch_size}"
        )
    return dataclasses.replace(SIZES[size], image_size=image_size, patch=patch_size)
