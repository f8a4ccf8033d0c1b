"""How families of text encoders treat token ids."""

import dataclasses
from typing import Any

import keras
from keras import ops, tree

from keras_cluster_mask.training.layers import all_layers
from keras_cluster_mask.types import Tensor


@dataclasses.dataclass(frozen=True)
class TextFamily:
    """How the text encoders of a family treat token ids.

    Attributes:
        layer: String, the class name of the keras_hub layer, or backbone, that only
            this family has.
        pooling: `"highest id"`, `"end token"` (the first one), `"last token"` of texts
            that all have the full length, or `"all tokens"`. The features depend on the
            tokens up to the pooled one; in the last two cases, on all.
        end_id: Integer, the id of the end token that every text must have, or `None`.
        padding_id: Integer, the id that is hidden as padding. Only an encoder with the
            input `"padding_mask"` hides any.
    """

    layer: str | None = None
    pooling: str = "all tokens"
    end_id: int | None = None
    padding_id: int = 0

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


# By the prefix of keras_hub's class names. Any other encoder, such as BERT, has the
# defaults.
TEXT_FAMILIES = {
    "CLIP": TextFamily("CLIPTextPooler", "highest id"),
    # keras_hub does not save another id than 2.
    "MetaCLIP2": TextFamily("MetaCLIP2TextPooler", "end token", end_id=2),
    # The last token attends to all others, padding included.
    "SigLIP": TextFamily("SigLIPTextEncoder", "last token"),
    "RoBERTa": TextFamily("RobertaBackbone", padding_id=1),
    "XLM-R": TextFamily("XLMRobertaBackbone", padding_id=1),
}


def text_family_of(model: keras.layers.Layer) -> TextFamily:
    """Returns the family of a text encoder, or of the backbone that contains one."""
    if isinstance(family := getattr(model, "text_family", None), TextFamily):
        return family
    parts = *all_layers(model), getattr(model, "backbone", model)
    layers = {type(part).__name__: part for part in parts}
    for family in TEXT_FAMILIES.values():
        if family.layer in layers:
            end = getattr(layers[family.layer], "eos_token_id", family.end_id)
            return dataclasses.replace(family, end_id=end)
    return TextFamily()


def text_input_names(encoder: keras.layers.Layer) -> tuple[str, ...]:
    """Returns the names of a text encoder's inputs.

    Args:
        encoder: A Keras model. A single input may have any name. If there are several,
            one must be named `"token_ids"`.

    Returns:
        A tuple of str.

    Raises:
        ValueError: If none of several inputs is `"token_ids"`.
    """
    inputs = getattr(encoder, "input", None)
    names = tuple(inputs) if isinstance(inputs, dict) else ()
    names = names or tuple(x.name for x in tree.flatten(inputs) if x is not None)
    if len(names) < 2:
        return ("token_ids",)
    if "token_ids" not in names:
        raise ValueError(
            "`text_encoder` must have one input, or inputs that are named as the "
            "entries of a batch, 'token_ids' among them. "
            f"Received: inputs {[*names]}"
        )
    return names
