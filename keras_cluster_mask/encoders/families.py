"""What is known of keras_hub's encoders: one table, which all other files read.

An encoder of another family is supported by an entry here. keras_hub's classes are
recognized by name, to avoid importing keras_hub.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from keras_cluster_mask.training.layers import all_layers
from keras_cluster_mask.types import Tensor

# Channel statistics that OpenAI trained CLIP with, for values in [0, 1]
# (https://github.com/openai/CLIP, clip/clip.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# SigLIP's images are in [-1, 1] (https://github.com/google-research/big_vision,
# `value_range(-1, 1)` in its configurations).
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
# ImageNet's, which DeiT, DINO and the convolutional networks of timm were trained with
# (https://github.com/facebookresearch/dinov2, dinov2/data/transforms.py).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ImageFamily:
    """A family of image encoders.

    Attributes:
        embedding: String, the class of the layer that returns the embedded tokens.
            `None` if no tokens can be dropped after a layer: a convolutional network,
            blocks that need the whole grid, or embedding and blocks in one layer.
        block: String, the class of its transformer blocks, or of the layer that holds
            embedding and blocks.
        num_prefix_tokens: Integer, the number of tokens before the patches, without
            registers.
        resizable: Boolean. Whether `with_image_size` supports it: config, positions and
            patch size are known.
        pooling: String, the pooling of `from_encoders`; `None` if that method does not
            take the encoder.
        pixel_mean: Three floats, by channel.
        pixel_std: Three floats, by channel.
    """

    embedding: str | None = None
    block: str | None = None
    num_prefix_tokens: int = 1
    resizable: bool = False
    pooling: str | None = None
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD


@dataclasses.dataclass(frozen=True)
class TextFamily:
    """A family of text encoders: how they treat token ids.

    Attributes:
        layer: String, the class of the layer by which a model of the family is
            recognized. `None` if that is the encoder.
        pooling: `"highest id"`, `"end token"` (the first one), `"last token"` of texts
            that all have the full length, or `"all tokens"`. The features depend on the
            tokens up to the pooled one; in the last two cases, on all.
        end_id: Integer, the id of the end token that every text must have, or `None`.
        padding_id: Integer, the id that is hidden as padding. Only an encoder with the
            input `"padding_mask"` hides any.
        of_pair: Boolean. Whether the encoder belongs to a backbone of two towers. All
            others are encoders for `from_encoders`, in which every token attends to all
            others.
    """

    layer: str | None = None
    pooling: str = "all tokens"
    end_id: int | None = None
    padding_id: int = 0
    of_pair: bool = False

    def is_pooled(self, token_ids: Any) -> Tensor | None:
        """Returns which token of each text is pooled; `None` if all are read.

        Args:
            token_ids: `(batch, T)` ints.

        Returns:
            `(batch, T)` booleans. A text without the end token has no true value.
        """
        if self.pooling == "highest id":
            is_end = ops.equal(token_ids, ops.max(token_ids, axis=1, keepdims=True))
        elif self.pooling == "end token":
            is_end = ops.equal(token_ids, self.end_id)
        else:
            return None
        # The first of them.
        counts = ops.cumsum(ops.cast(is_end, "int32"), axis=1)
        return ops.logical_and(is_end, ops.equal(counts, 1))


@dataclasses.dataclass(frozen=True)
class PairFamily:
    """A family of backbones of two towers, which were trained together.

    Attributes:
        head: String, the backbone's layer with the scale of the logits.
        loss: String, the loss of its training.
        max_logit_scale: Float, the limit of the scale.
        pixel_mean: Three floats, by channel.
        pixel_std: Three floats, by channel.
        resize: String. How images were resized, see `ContrastiveModel`.
    """

    head: str
    loss: str = "softmax"
    max_logit_scale: float = 100.0
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD
    resize: str = "crop"


# By the name of keras_hub's class.
IMAGE_FAMILIES = {
    "CLIPVisionEncoder": ImageFamily(
        "CLIPVisionEmbedding",
        "CLIPEncoderLayer",
        resizable=True,
    ),
    "MetaCLIP2VisionEncoder": ImageFamily(
        "MetaCLIP2VisionEmbedding",
        "MetaCLIP2EncoderLayer",
        resizable=True,
    ),
    "SigLIPVisionEncoder": ImageFamily(
        "SigLIPVisionEmbedding",
        "SigLIPEncoderLayer",
        num_prefix_tokens=0,
        resizable=True,
    ),
    # Also the layers of BLIP-2's vision encoder.
    "ViTBackbone": ImageFamily(
        "ViTPatchingAndEmbedding",
        "ViTEncoderBlock",
        resizable=True,
        pooling="class",
        pixel_mean=SIGLIP_MEAN,
        pixel_std=SIGLIP_STD,
    ),
    "DeiTBackbone": ImageFamily(
        "DeiTEmbeddings",
        "DeiTEncoderBlock",
        num_prefix_tokens=2,
        pooling="class",
    ),
    "DINOV2Backbone": ImageFamily(
        "DINOV2Embedding",
        "DINOV2Layer",
        resizable=True,
        pooling="class_and_mean",
    ),
    "DINOV3Backbone": ImageFamily(
        "DINOV3Embedding", "DINOV3Layer", pooling="class_and_mean"
    ),
    # Without tokens: the pooling is the mean over the positions of the last layer.
    "EfficientNetBackbone": ImageFamily(pooling="mean"),
    "MobileNetBackbone": ImageFamily(pooling="mean"),
    "ResNetBackbone": ImageFamily(pooling="mean"),
    # Known in order to be refused by name.
    "Gemma3VisionEncoder": ImageFamily(block="Gemma3VisionEncoderBlock"),
    "Gemma4VisionEncoder": ImageFamily(block="Gemma4VisionEncoderBlock"),
    "PaliGemmaVit": ImageFamily(block="PaliGemmaVitEncoder"),
    "SwinTransformerBackbone": ImageFamily(block="SwinTransformerStage"),
}

TEXT_FAMILIES = {
    "CLIPTextEncoder": TextFamily("CLIPTextPooler", "highest id", of_pair=True),
    # keras_hub does not save another id than 2.
    "MetaCLIP2TextEncoder": TextFamily(
        "MetaCLIP2TextPooler", "end token", end_id=2, of_pair=True
    ),
    # The last token attends to all others, padding included.
    "SigLIPTextEncoder": TextFamily(pooling="last token", of_pair=True),
    "AlbertBackbone": TextFamily(),
    "BertBackbone": TextFamily(),
    "DebertaV3Backbone": TextFamily(),
    "DistilBertBackbone": TextFamily(),
    "ElectraBackbone": TextFamily(),
    "RobertaBackbone": TextFamily(padding_id=1),
    "XLMRobertaBackbone": TextFamily(padding_id=1),
}

PAIR_FAMILIES = {
    "CLIPBackbone": PairFamily("clip_head"),
    "MetaCLIP2Backbone": PairFamily("metaclip_2_head"),
    "SigLIPBackbone": PairFamily(
        "siglip_head",
        loss="sigmoid",
        # SigLIP is trained without a limit, to scales above 110. This one only stops a
        # scale that diverges.
        max_logit_scale=1000.0,
        pixel_mean=SIGLIP_MEAN,
        pixel_std=SIGLIP_STD,
        resize="squash",
    ),
}

# The families of image encoders by the class of their embedding layer, and by the class
# of their blocks.
EMBEDDINGS = {x.embedding: x for x in IMAGE_FAMILIES.values() if x.embedding}
BLOCKS = {x.block: x for x in IMAGE_FAMILIES.values() if x.block}
# The classes of the blocks of the text encoders of `from_encoders`.
TEXT_BLOCKS = ("TransformerEncoder", "DisentangledAttentionEncoder")


def num_prefix_tokens(embedding: keras.layers.Layer) -> int | None:
    """Returns the number of tokens before the patches; `None` for an unknown family.

    Args:
        embedding: The layer of an encoder that returns the embedded tokens.
    """
    family = EMBEDDINGS.get(type(embedding).__name__)
    if family is None:
        return None
    has_class = getattr(embedding, "use_class_token", True)
    registers = getattr(embedding, "num_register_tokens", 0)
    return family.num_prefix_tokens * has_class + registers


def weights_by_block(encoder: keras.Model) -> list[list[keras.Variable]]:
    """Lists the weights of an encoder by depth.

    Returns:
        A list of lists: the weights before the first transformer block, and those of
        each block. Weights after the last block that is pooled are in the last list.
        Without blocks of a known family, one list has all weights.
    """
    layers = all_layers(encoder)
    pooled = [n for x in layers for n in getattr(x, "block_numbers", None) or ()]
    last = max(pooled, default=math.inf)
    kinds = {*BLOCKS, *TEXT_BLOCKS}
    block_of = {
        id(weight): layer
        for layer in layers
        if kinds & {kind.__name__ for kind in type(layer).__mro__}
        for weight in layer.weights
    }
    groups, current = [[]], None
    # Weights are in the order of layers, but `all_layers` is not.
    for weight in encoder.weights:
        block = block_of.get(id(weight), current)
        if block is not current and len(groups) <= last:
            groups.append([])
        current = block
        groups[-1].append(weight)
    return groups


def family_of(
    name: str,
    model: Any,
    families: Mapping[str, Any],
    is_supported: Callable[[Any], Any] = bool,
    hint: str = "",
):
    """Returns the family of a model of keras_hub.

    Args:
        name: String, the name of the argument, for the error.
        model: The model.
        families: Dictionary of families, by class name.
        is_supported: Function from a family to whether it can be used here. By default,
            all can.
        hint: String, what else can be done.
    """
    known = [kind for kind, family in families.items() if is_supported(family)]
    for kind in type(model).__mro__:
        if kind.__name__ in known:
            return families[kind.__name__]
    raise ValueError(
        f"`{name}` must be one of these keras_hub models: {', '.join(known)}. "
        f"{hint}Received: {name}={model} of type {type(model).__name__}"
    )


def text_family_of(model: keras.layers.Layer) -> TextFamily:
    """Returns the family of a text encoder, or of the backbone that contains one.

    A text encoder of an unknown family is treated like BERT.
    """
    if isinstance(family := getattr(model, "text_family", None), TextFamily):
        return family
    parts = *all_layers(model), getattr(model, "backbone", model)
    layers = {kind.__name__: x for x in parts for kind in type(x).__mro__}
    for name, family in TEXT_FAMILIES.items():
        if found := layers.get(family.layer or name):
            end = getattr(found, "eos_token_id", family.end_id)
            return dataclasses.replace(family, end_id=end)
    return TextFamily()
