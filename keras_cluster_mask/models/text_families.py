"""Text encoders by family: the token that is pooled, special ids, and inputs."""

import dataclasses
from typing import Any

import keras
from keras import ops, tree

from keras_cluster_mask.training.layers import all_layers
from keras_cluster_mask.types import Tensor

# Inputs that are made from the token ids if a batch does not hold them.
MADE = "padding_mask", "segment_ids"


@dataclasses.dataclass(frozen=True)
class TextFamily:
    """How the text encoders of a family treat token ids.

    Attributes:
        layer: String, the class name of the keras_hub layer that only this family has.
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
}


def text_family_of(model: keras.layers.Layer) -> TextFamily:
    """Returns the family of a text encoder, or of the backbone that contains one."""
    layers = {type(layer).__name__: layer for layer in all_layers(model)}
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


def text_inputs(names: tuple[str, ...], family: TextFamily, given: Any) -> Any:
    """Returns the inputs to call a text encoder on: ids, or a dictionary of inputs.

    For a BERT encoder, missing inputs are made from the ids. The `"padding_mask"` hides
    padding; `InputRules` refuses ids of padding between others. The `"segment_ids"` are
    0, because a caption is one segment.

    Args:
        names: The names of the encoder's inputs.
        family: The family of the encoder.
        given: `(batch, T)` token ids, or a dictionary of inputs by name.

    Returns:
        A tensor, or a dictionary of tensors.

    Raises:
        ValueError: If an input is missing, or the encoder does not have it.
    """
    given = given if isinstance(given, dict) else {"token_ids": given}
    inputs = {name: ops.convert_to_tensor(value) for name, value in given.items()}
    if "token_ids" in inputs:
        ids = inputs["token_ids"]
        if "padding_mask" in names and "padding_mask" not in inputs:
            is_word = ops.not_equal(ids, family.padding_id)
            inputs["padding_mask"] = ops.cast(is_word, "int32")
        if "segment_ids" in names and "segment_ids" not in inputs:
            inputs["segment_ids"] = ops.zeros_like(ids)
    if inputs.keys() != {*names}:
        missing = [name for name in names if name not in inputs]
        raise ValueError(
            "`token_ids` must be an array of ids, or a dictionary of the inputs of the "
            f"text encoder, {[*names]}; missing: {missing}. "
            f"Received: keys={sorted(given)}"
        )
    return inputs if len(names) > 1 else ids
