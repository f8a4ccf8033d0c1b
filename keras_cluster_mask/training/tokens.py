"""Whether a tokenizer is one that a model's text tower can work with."""

import numpy as np


def check_tokenizer(model, tokenizer, context_length=None):
    """Raises an error for a tokenizer that does not suit the text tower of a model.

    The tokenizer is applied to a few fixed sentences.

    Args:
        model: A `ContrastiveModel`.
        tokenizer: See `image_text_dataset`.
        context_length: Integer, the length of the rows of a tokenizer that can make
            rows of any length. `None`: its own.
    """
    # Imported here: it needs packages that `import keras` does not.
    from keras_cluster_mask.data.tokenizing import probe

    ids = probe(tokenizer, context_length)
    if ids is None:
        return
    longest = model.context_length
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(
            f"`tokenizer` must return at most {longest} ids a text, the most that the "
            "text encoder takes: set its length. "
            f"Received: tokenizer={tokenizer}, which returns ids of shape {ids.shape}"
        )
    if model.pools_highest_id and not _has_special_tokens(ids):
        raise ValueError(
            "`tokenizer` must add a start token to each text, and an end token that "
            "has the highest id, at which a CLIP text encoder pools. Pass a "
            "`kcm.data.CLIPTokenizer`, or `keras_hub.models.CLIPPreprocessor("
            "tokenizer)` for a tokenizer of keras_hub. "
            f"Received: tokenizer={tokenizer}, which starts with the ids "
            f"{ids[:, 0].tolist()}, and has the highest ids {ids.max(1).tolist()} at "
            f"{ids.argmax(1).tolist()}, for three sentences"
        )


def check_tokenizer_of(model, data):
    """As `check_tokenizer`, for the tokenizer of an `image_text_dataset`."""
    stream = getattr(data, "stream", None)
    tokenizer = getattr(stream, "tokenizer", None)
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)


def _has_special_tokens(ids):
    """Whether sentences of rising lengths begin alike and end in the highest id."""
    ends = ids.argmax(axis=1)
    # Sentences that are too long end in the last column.
    moves = (np.diff(ends) > 0) | (ends[1:] == ids.shape[1] - 1)
    same = [len(np.unique(tokens)) == 1 for tokens in (ids[:, 0], ids.max(axis=1))]
    # The first is one word: what repeats before its end token fills up the row.
    is_filled = ends[0] > 1 and ids[0, ends[0] - 1] == ids[0, ends[0] - 2]
    return bool(all(same) and ends[0] > 0 and moves.all() and not is_filled)
