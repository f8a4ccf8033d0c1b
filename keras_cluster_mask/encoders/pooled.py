"""Encoders made of pre-trained backbones: what is pooled, and how pixels are scaled."""

from typing import Any

import keras
from keras import ops

from keras_cluster_mask.checks import check_choice
from keras_cluster_mask.encoders.families import (
    IMAGE_FAMILIES,
    TEXT_BLOCKS,
    TEXT_FAMILIES,
    family_of,
    num_prefix_tokens,
)
from keras_cluster_mask.encoders.masked import with_masking
from keras_cluster_mask.encoders.surgery import (
    data_format_of,
    find_embedding_layer,
    inputs_of,
)
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.training.layers import MadeOfParts, Untracked
from keras_cluster_mask.types import Tensor

POOLINGS = ("class", "mean", "class_and_mean")


def pretrained_towers(
    image: keras.Model,
    text: keras.Model,
    masking: PatchMasking | None,
    pooling: tuple[str | None, str | None] | None,
    image_blocks: int | list[int] | None,
    text_blocks: int | list[int] | None,
) -> tuple[keras.Model, keras.Model, dict[str, Any]]:
    """Returns an image encoder, a text encoder, and the statistics of pixels.

    See `ContrastiveModel.from_encoders`.
    """
    hint = "Pass other encoders, with their own pooling, to `ContrastiveModel`. "
    family = family_of("image", image, IMAGE_FAMILIES, lambda x: x.pooling, hint)
    # A `TextEmbedder` has a backbone and a pooling.
    texts = getattr(text, "backbone", text)
    family_of("text", texts, TEXT_FAMILIES, lambda x: not x.of_pair, hint)
    if isinstance(pooling, str):
        raise ValueError(
            "`pooling` must be a pair of values, for images and for texts, such as "
            f"('class', None). Received: pooling={pooling!r}"
        )
    of_images, of_texts = pooling or (None, None)
    own = getattr(text, "pooling_mode", "mean").replace("cls", "class")
    if masking is not None and family.embedding is None:
        raise ValueError(
            "`masking` must be None for an image encoder without patch tokens, which "
            f"reads whole images. Received: masking={masking}, image of "
            f"type {type(image).__name__}"
        )
    if image_blocks is None:
        of_images = of_images or family.pooling
    if text_blocks is None:
        of_texts = of_texts or own
    images = PooledEncoder(image, of_images, image_blocks)
    images = images if masking is None else with_masking(images, masking)
    statistics = {"pixel_mean": family.pixel_mean, "pixel_std": family.pixel_std}
    return images, PooledEncoder(texts, of_texts, text_blocks), statistics


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class PooledEncoder(MadeOfParts, keras.Model):
    """A backbone with a pooling of its tokens, which shares the backbone's weights.

    Args:
        backbone: A keras_hub backbone that returns tokens, or a convolutional one that
            returns `(batch, H, W, C)` features.
        pooling: String, one of `POOLINGS`. `None`: the class token, if there is one,
            and the mean.
        block_numbers: Integer or list of integers, the transformer blocks after which
            tokens are pooled, see `ContrastiveModel.from_encoders`. `None` pools the
            output of the backbone.
        **kwargs: Arguments of `keras.Model`.

    Attributes:
        backbone: The backbone.
        pooling: The pooling.
        block_numbers: List of the numbers of the blocks, from 1, or `None`.
    """

    _arguments = ("backbone", "pooling", "block_numbers")

    def __init__(
        self,
        backbone: keras.Model,
        pooling: str | None,
        block_numbers: int | list[int] | None = None,
        **kwargs: Any,
    ):
        inputs, outputs = backbone.input, _tokens_of(backbone)
        mask, prefix, table = inputs_of(backbone).get("padding_mask"), 0, None
        is_grid = len(outputs.shape) == 4
        outputs = [outputs]
        if block_numbers is not None:
            name = "image_blocks" if mask is None else "text_blocks"
            after_blocks = tokens_after_blocks(backbone)
            numbers = check_block_numbers(name, block_numbers, len(after_blocks))
            block_numbers, outputs = numbers, [after_blocks[x - 1] for x in numbers]
        if mask is None and not is_grid:
            embedding = find_embedding_layer(backbone)
            prefix = num_prefix_tokens(embedding)
            table = getattr(embedding, "interpolated_position_embeddings", None)
        has_class = mask is not None or prefix > 0
        pooling = pooling or ("class_and_mean" if has_class else "mean")
        check_choice("pooling", pooling, POOLINGS)
        if not has_class and pooling != "mean":
            raise ValueError(
                "`pooling` must be 'mean' for an image encoder without a class "
                f"token. Received: pooling={pooling!r}, a {type(backbone).__name__}"
            )
        # Not the global policy, which the functional model would not save.
        options = {"dtype": "float32", "name": "pooling"}
        if is_grid:
            data_format = data_format_of(backbone)
            layer = keras.layers.GlobalAveragePooling2D(data_format, **options)
        else:
            layer = TokenPooling(pooling, prefix, **options)
        more = {} if is_grid else {"mask": mask}
        pooled = [layer(tokens, **more) for tokens in outputs]
        pooled = ops.concatenate(pooled, axis=-1) if len(pooled) > 1 else pooled[0]
        kwargs.setdefault("name", f"pooled_{backbone.name}")
        super().__init__(inputs, pooled, **kwargs)
        # It has layers that lead to no output, such as BERT's pooler.
        self._given = Untracked(backbone=backbone)
        self.pooling = pooling
        self.block_numbers = block_numbers
        if table is not None:
            self.position_table = SavedWeight(table)
        for name in ("patch_size", "vocabulary_size", "max_sequence_length"):
            setattr(self, name, getattr(backbone, name, None))
        if hasattr(backbone, "vocab_size"):
            # ELECTRA's name for it.
            self.vocabulary_size = backbone.vocab_size

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if type(self.backbone).__name__ == "EfficientNetBackbone":
            # keras_hub's configuration omits the number of channels.
            first = data_format_of(self.backbone) == "channels_first"
            channels = self.backbone.output.shape[1 if first else -1]
            config["backbone"]["config"]["num_features"] = channels
        return config

    @property
    def backbone(self) -> keras.Model:
        """The backbone, which shares its weights with this model."""
        return self._given.backbone


def tokens_after_blocks(backbone: keras.Model) -> list[keras.KerasTensor]:
    """Returns the tokens after each block of a backbone; the last are its output.

    A convolutional network has none.
    """
    found = []

    def call(layer, *args, **kwargs):
        """Calls a layer of the backbone again, from the first block on."""
        kind = type(layer).__name__
        if kind in TEXT_BLOCKS:
            found.append(outputs := layer(*args, **kwargs))
        elif kind in ("ViTEncoder", "DeiTEncoder"):
            found.extend(AllBlocks(layer)(*args))
            outputs = found[-1]
        elif kind in ("DINOV2Encoder", "DINOV3Encoder"):
            outputs = layer(*args, **kwargs)
            found.extend(outputs[1].values())
        elif not found:
            # Not called again, so that `layer.output` is still of this graph.
            outputs = layer.output
        else:
            outputs = layer(*args, **kwargs)
        return outputs

    # The layers are the same. A layer of ALBERT is several blocks.
    clone = keras.models.clone_model(backbone, backbone.input, lambda x: x, call)
    return [*found[:-1], _tokens_of(clone)] if found else []


def check_block_numbers(name: str, blocks: Any, count: int) -> list[int]:
    """Returns the block numbers, from 1, that an argument specifies."""
    numbers = [*range(1, count + 1)]
    if type(blocks) is int and blocks in numbers:
        return numbers[-blocks:]
    if isinstance(blocks, list | tuple) and blocks:
        chosen = [x for x in numbers if x in blocks]
        if chosen == [*blocks]:
            return chosen
    raise ValueError(
        f"`{name}` must be None, a number of last blocks, or an increasing list of "
        f"block numbers from 1, for an encoder with {count} transformer blocks. "
        f"Received: {name}={blocks}"
    )


def _tokens_of(backbone):
    output = backbone.output
    return output["sequence_output"] if isinstance(output, dict) else output


class AllBlocks(keras.layers.Layer):
    """Runs the blocks of ViT or DeiT, which return only the last tokens.

    Args:
        encoder: A keras_hub `ViTEncoder` or `DeiTEncoder`, which shares its weights.

    Returns:
        List of `(batch, T, dim)` tensors, the tokens after each block. The last ones
        are after the norm of the encoder.
    """

    def __init__(self, encoder: keras.layers.Layer):
        super().__init__(name=f"{encoder.name}_blocks", dtype=encoder.dtype_policy)
        self.encoder = encoder
        self.supports_masking = True
        self.built = True

    def call(self, tokens: Tensor, training: bool | None = None) -> list[Tensor]:
        outputs = []
        if hasattr(self.encoder, "dropout"):
            tokens = self.encoder.dropout(tokens, training=training)
        for block in self.encoder.encoder_layers:
            tokens = block(tokens, training=training)
            # DeiT's block also returns its attention scores, as `None`.
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
            outputs.append(tokens)
        return [*outputs[:-1], self.encoder.layer_norm(tokens)]


class SavedWeight(keras.layers.Layer):
    """Saves a weight of another layer exactly, and loads it after that layer.

    keras_hub saves the position embeddings of DINOv2 for the image size of its
    pre-training, and interpolates them when it saves and loads.

    Args:
        weight: A `keras.Variable`.
    """

    def __init__(self, weight: keras.Variable):
        super().__init__()
        self._of_other = Untracked(weight=weight)
        self.built = True

    def save_own_variables(self, store: Any) -> None:
        store["0"] = ops.convert_to_numpy(self._of_other.weight)

    def load_own_variables(self, store: Any) -> None:
        self._of_other.weight.assign(store["0"])


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class TokenPooling(keras.layers.Layer):
    """Pools tokens into one vector of features.

    Args:
        pooling: `"class"`: the first token. `"mean"`: the mean of the tokens after the
            prefix that are not hidden. `"class_and_mean"`: both, concatenated.
        num_prefix_tokens: Integer, the number of tokens that the mean skips.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        tokens: `(batch, T, dim)` tensor.
        mask: `(batch, T)` tensor, 0 for hidden tokens, or `None`.

    Returns:
        `(batch, dim)` tensor, or `(batch, 2 * dim)` for `"class_and_mean"`.
    """

    def __init__(self, pooling: str, num_prefix_tokens: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        self.pooling = pooling
        self.num_prefix_tokens = num_prefix_tokens
        self.supports_masking = True

    def call(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        first = tokens[:, 0]
        if self.pooling == "class":
            return first
        rest = tokens[:, self.num_prefix_tokens :]
        if mask is None:
            mean = ops.mean(rest, axis=1)
        else:
            weights = ops.cast(mask[:, self.num_prefix_tokens :, None], rest.dtype)
            count = ops.maximum(ops.sum(weights, axis=1), 1)
            mean = ops.sum(rest * weights, axis=1) / count
        return mean if self.pooling == "mean" else ops.concatenate([first, mean], -1)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        return None
