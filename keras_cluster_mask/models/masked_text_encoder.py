"""A text encoder with a masking in it."""

import math
from typing import Any, Self

import keras
from keras import ops, tree

from keras_cluster_mask.distribution.gathers import take_rows
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.masking.context import (
    fixed_scores,
    kept_patches,
    prefix_tokens,
)
from keras_cluster_mask.models.encoders import (
    METACLIP_2_END_ID,
    TEXT_ENCODERS,
    call_encoder,
    split_at,
)
from keras_cluster_mask.training.layers import all_layers, from_parts, frozen_parts
from keras_cluster_mask.types import Tensor

# A word between a start and an end token.
FEWEST_TOKENS = 3
# The argument here, and the one of a model of two towers, whose `masking` is of images.
NAMES = "`masking`, or `text_masking` of a model,"


def with_text_masking(
    encoder: keras.Model, masking: PatchMasking, padding_first: bool = True
) -> "MaskedTextEncoder":
    """Inserts a masking after the embedding layer of a text encoder.

    In training a part of the tokens of every text is left out, after the position
    embedding: those that stay keep their positions and their order. The start token and
    the token that is pooled always stay. The returned model shares all weights with
    `encoder`; at inference both give the same output. For a keras_hub backbone of two
    towers, pass `text_masking` to `kcm.ContrastiveModel.from_backbone`.

    A text of `T` tokens keeps `masking.num_kept(T)` tokens, including those that always
    stay. Which tokens are padding, and the effect of dropping them, depend on the
    encoder:

    - CLIP and MetaCLIP 2 pool the end token, and padding is all that comes after it.
      Their attention is causal, so padding has no influence: with `padding_first`, a
      text that fits into the tokens that stay is embedded as without a masking.
    - SigLIP pools the last token and pads with the end token, so all tokens at the end
      that repeat the last one are padding. Its attention reads padding: any token that
      is left out changes the embedding. Its texts have no start token, and the first
      word may be left out like any other.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    masked = kcm.with_text_masking(backbone.text_encoder, kcm.RandomMasking(0.5))
    ids = np.random.randint(1, 100, (2, 12))
    tokens = masked(ids, training=True)  # (2, 12, 96), of which (2, 6) are not 0
    ```

    Args:
        encoder: A keras_hub `CLIPTextEncoder`, `MetaCLIP2TextEncoder` or
            `SigLIPTextEncoder`.
        masking: A `PatchMasking` layer that needs no images: a `RandomMasking`, or a
            strategy of your own.
        padding_first: Boolean. Whether padding is left out before any word, FLIP's
            prioritized masking. `False` is its random masking, which treats padding
            as words.

    Returns:
        A `MaskedTextEncoder`, a Keras model with the inputs and outputs of `encoder`.

    Raises:
        ValueError: For another encoder; for a masking that needs images or their grid,
            that hides tokens behind a Keras mask or has `num_prefix_tokens`; and if
            fewer than 3 tokens would stay.

    Reference:
        - [Scaling Language-Image Pre-training via Masking](
          https://arxiv.org/abs/2212.00794). Leaving out half of the text tokens costs
          0.4 points of zero-shot accuracy on ImageNet with padding first, and 2.2
          points at random (ViT-L/16 on LAION-400M, a quarter of the patches). The
          official code does not contain text masking.
    """
    return MaskedTextEncoder(encoder, masking, padding_first)


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class MaskedTextEncoder(keras.Model):
    """A text encoder with a masking in it. Made by `kcm.with_text_masking`.

    Args:
        encoder: A keras_hub text encoder.
        masking: A `PatchMasking` layer.
        padding_first: Boolean. Whether padding is left out before any word.
        **kwargs: Arguments of `keras.Model`.

    Call arguments:
        inputs: `(batch, T)` token ids, or a dictionary of them, as `encoder` takes
            them.
        training: Python boolean. Tokens are left out only if it is true.
        noise: `(batch, T)` float32 tensor for the masking. Drawn if not given.

    Returns:
        What `encoder` returns. Tokens `(batch, T, dim)` are 0 where they were left out,
        so that the one that is pooled is found where it was.

    Attributes:
        encoder: The encoder, which shares its weights with this model.
        masking: The masking.
        padding_first: Whether padding is left out before any word.
    """

    def __init__(
        self,
        encoder: keras.Model,
        masking: PatchMasking,
        padding_first: bool = True,
        **kwargs: Any,
    ):
        family = _family_of(encoder)
        _check_masking(masking)
        kwargs.setdefault("name", f"masked_{encoder.name}")
        super().__init__(**kwargs)
        # The encoder casts for itself, and the masking must see its own tokens.
        self.autocast = False
        self._family = family
        self.encoder = encoder
        self.masking = masking
        self.padding_first = bool(padding_first)
        # In a function rather than in attributes: Keras would track and save the
        # parts, and every weight a second time with them.
        parts = split_at(encoder, encoder.embedding)
        self._parts = lambda: parts
        self.num_kept(encoder.max_sequence_length)
        self.built = True

    def call(
        self, inputs: Any, training: bool | None = None, noise: Tensor | None = None
    ) -> Any:
        if not training:
            return call_encoder(self.encoder, inputs, training=False)
        stem, blocks = self._parts()
        tokens = call_encoder(stem, inputs, training=True)
        length = tokens.shape[1]
        self.num_kept(length)
        (ids,) = tree.flatten(inputs)
        # TensorFlow may know the length of the tokens alone.
        scores = self._fixed_scores(ops.reshape(ids, (-1, length)))
        with prefix_tokens(0), fixed_scores(scores), kept_patches() as kept:
            tokens = self.masking(tokens, training=True, noise=noise)
        return tree.map_structure(
            lambda x: _at_positions(x, kept[0], length) if len(x.shape) == 3 else x,
            blocks(tokens, training=True),
        )

    def num_kept(self, length: int | None) -> int:
        """How many tokens stay of a text of `length` tokens; raises if too few."""
        if length is None:
            raise ValueError(
                "`token_ids` must have a known length to be masked: a tokenizer of "
                "your own tells it by an attribute `context_length`. "
                "Received: a batch of unknown length"
            )
        kept = self.masking.num_kept(length)
        if kept < FEWEST_TOKENS:
            raise ValueError(
                f"{NAMES} must keep at least {FEWEST_TOKENS} tokens of a text: a "
                "word, and the tokens that always stay. Use a lower `mask_ratio`. "
                f"Received: masking={self.masking.name}, which keeps {kept} of {length}"
            )
        return kept

    def _fixed_scores(self, ids):
        """The scores of tokens that always stay, and of those that leave first."""
        stays, is_padding = special_tokens(self._family, ids)
        leaves_first = is_padding if self.padding_first else ops.zeros_like(is_padding)
        return ops.where(stays, math.inf, ops.where(leaves_first, -math.inf, 0.0))

    @property
    def vocabulary_size(self) -> int:
        return self.encoder.vocabulary_size

    @property
    def max_sequence_length(self) -> int:
        return self.encoder.max_sequence_length

    @property
    def input(self) -> Any:
        return self.encoder.input

    @property
    def output(self) -> Any:
        return self.encoder.output

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.encoder.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "encoder": keras.saving.serialize_keras_object(self.encoder),
            "masking": keras.saving.serialize_keras_object(self.masking),
            "padding_first": self.padding_first,
            "frozen": frozen_parts(self),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        return from_parts(cls, config, custom_objects)


def special_tokens(family, ids):
    """Which tokens of texts always stay, and which are padding.

    Args:
        family: String, the name of a keras_hub text encoder's class.
        ids: `(batch, T)` int tensor.

    Returns:
        A tuple of two boolean tensors that broadcast to `(batch, T)`.
    """
    length = ids.shape[1]
    positions = ops.arange(length, dtype="int32")[None]
    if family == "SigLIPTextEncoder":
        is_text = ops.not_equal(ids, ids[:, -1:])
        last = ops.max(ops.where(is_text, positions, -1), axis=1, keepdims=True)
        return positions == length - 1, positions > last
    is_end = ids if family == "CLIPTextEncoder" else ids == METACLIP_2_END_ID
    end = ops.argmax(ops.cast(is_end, "int32"), axis=1, keepdims=True)
    end = ops.cast(end, "int32")
    return ops.logical_or(positions == 0, positions == end), positions > end


def tokens_per_text(encoder, length: int) -> int | None:
    """How many tokens the blocks of an encoder read of a text in training.

    Args:
        encoder: A text encoder, masked or not.
        length: Integer, the number of tokens of a text.

    Returns:
        Integer; `None` if a masking is a layer of the user's own model.
    """
    layers = all_layers(encoder)
    masked = [x for x in layers if isinstance(x, MaskedTextEncoder)]
    if masked:
        return masked[0].num_kept(length)
    return None if any(isinstance(x, PatchMasking) for x in layers) else length


def _at_positions(tokens, indices, length):
    """Kept tokens at the positions they had, with zeros at all others."""
    is_kept = ops.sum(ops.one_hot(indices, length, dtype="int32"), axis=1)
    # Row 0 is one of zeros.
    rows = is_kept * ops.cumsum(is_kept, axis=1)
    tokens = ops.pad(tokens, [(0, 0), (1, 0), (0, 0)])
    return take_rows(tokens, rows)


def _family_of(encoder):
    for cls in type(encoder).__mro__:
        if cls.__name__ in TEXT_ENCODERS:
            return cls.__name__
    raise ValueError(
        "`encoder` must be a text encoder of keras_hub whose pooled token is known: "
        f"{', '.join(TEXT_ENCODERS)}. "
        f"Received: encoder={encoder} of type {type(encoder).__name__}"
    )


def _check_masking(masking):
    if not isinstance(masking, PatchMasking):
        raise ValueError(
            f"{NAMES} must be a `PatchMasking` layer. "
            f"Received: masking={masking} of type {type(masking).__name__}"
        )
    reasons = {
        "reads images": masking.patch_size is not None,
        "needs the grid of an image": "grid" in masking.get_config(),
        "hides tokens behind a Keras mask": masking.hides_tokens,
        f"has num_prefix_tokens={masking.num_prefix_tokens}": masking.num_prefix_tokens,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"{NAMES} must be one for texts, such as `RandomMasking()`. Received: "
                f"masking={masking.name} of type {type(masking).__name__}, which "
                f"{reason}"
            )
