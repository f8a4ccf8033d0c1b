"""Text encoders by family: the token that is pooled, and special ids."""

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_cluster_mask.training.layers import all_layers
from keras_cluster_mask.types import Tensor


@dataclasses.dataclass(frozen=True)
class TextFamily:
    """How the text encoders of a family treat token ids.

    Attributes:
        layer: String, the class name of the keras_hub layer, or backbone, that only
            this family has.
        pooling: `"highest id"`, `"end token"` (the first one), or `"all tokens"` if the
            features depend on all tokens.
        end_id: Integer, the id of the end token that every text must have, or `None`.
        padding_id: Integer, the id that is hidden as padding. Only an encoder with the
            input `"padding_mask"` hides any.
    """

    layer: str | None = None
    pooling: str = "all tokens"
    end_id: int | None = None
    padding_id: int = 0

    def pooled_at(self, token_ids: Any) -> Tensor | None:
        """Returns the index of the pooled token in each text; `None` if all are read.

        Args:
            token_ids: `(batch, T)` ints.
        """
        if self.pooling == "highest id":
            return ops.argmax(token_ids, axis=-1)
        if self.pooling == "end token":
            is_end = ops.equal(token_ids, self.end_id)
            return ops.argmax(ops.cast(is_end, "int32"), axis=-1)
        return None


# By the prefix of keras_hub's class names. Any other encoder, such as BERT, has the
# defaults.
TEXT_FAMILIES = {
    "CLIP": TextFamily("CLIPTextPooler", "highest id"),
    # keras_hub does not save another id than 2.
    "MetaCLIP2": TextFamily("MetaCLIP2TextPooler", "end token", end_id=2),
    # It pools the last token, which attends to all others, padding included.
    "SigLIP": TextFamily("SigLIPTextEncoder"),
    "RoBERTa": TextFamily("RobertaBackbone", padding_id=1),
    "XLM-R": TextFamily("XLMRobertaBackbone", padding_id=1),
}


def text_family_of(model: keras.layers.Layer) -> TextFamily:
    """Returns the family of a text encoder, or of the backbone that contains one."""
    parts = *all_layers(model), getattr(model, "backbone", model)
    layers = {type(part).__name__: part for part in parts}
    for family in TEXT_FAMILIES.values():
        if family.layer in layers:
            end = getattr(layers[family.layer], "eos_token_id", family.end_id)
            return dataclasses.replace(family, end_id=end)
    return TextFamily()
