"""Inputs of a text encoder: token ids and, for some encoders, further tensors."""

from keras import ops, tree

# Inputs that are created if they are not given.
MADE = "padding_mask", "segment_ids"


def text_input_names(encoder) -> list[str]:
    """Returns the names of a text encoder's inputs.

    Args:
        encoder: A Keras model. A single input may have any name. If there are several,
            one must be named `"token_ids"`.

    Returns:
        A list of str.

    Raises:
        ValueError: If none of several inputs is `"token_ids"`.
    """
    inputs = getattr(encoder, "input", None)
    names = [*inputs] if isinstance(inputs, dict) else []
    names = names or [x.name for x in tree.flatten(inputs) if x is not None]
    if len(names) < 2:
        return ["token_ids"]
    if "token_ids" not in names:
        raise ValueError(
            "`text_encoder` must have one input, or inputs that are named as the "
            f"entries of a batch, 'token_ids' among them. Received: inputs {names}"
        )
    return names


def text_inputs(encoder, given):
    """Returns the inputs to call a text encoder on: ids, or a dictionary of inputs.

    For a BERT encoder, missing inputs are created. The `"padding_mask"` hides ids of 0,
    which tokenizers use for padding; `InputRules` detects zeros that are not padding.
    The `"segment_ids"` are 0, because a caption is one segment.

    Args:
        encoder: A Keras model.
        given: `(batch, T)` token ids, or a dictionary of inputs by name.

    Returns:
        A tensor, or a dictionary of tensors.

    Raises:
        ValueError: If the encoder has no input of a given name, or an input is missing.
    """
    names = text_input_names(encoder)
    given = given if isinstance(given, dict) else {"token_ids": given}
    if given.keys() - {*names} or "token_ids" not in given:
        raise ValueError(
            "`token_ids` must be an array of ids, or a dictionary that holds "
            f"'token_ids' and only inputs of `{encoder.name}`: {names}. "
            f"Received: keys={sorted(given)}"
        )
    given = {name: ops.convert_to_tensor(value) for name, value in given.items()}
    ids = given["token_ids"]
    if "padding_mask" in names and "padding_mask" not in given:
        given["padding_mask"] = ops.cast(ops.not_equal(ids, 0), "int32")
    if "segment_ids" in names and "segment_ids" not in given:
        given["segment_ids"] = ops.zeros_like(ids)
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"A batch must hold the inputs of `{encoder.name}`; missing: {missing}. "
            f"Received: keys={sorted(given)}"
        )
    return given if len(names) > 1 else ids
