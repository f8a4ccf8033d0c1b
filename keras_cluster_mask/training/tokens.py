"""Checks that a tokenizer matches the text tower and the tokenizer of a model."""

import functools
import hashlib

import numpy as np

from keras_cluster_mask.losses import without_padding
from keras_cluster_mask.training.tokenizer_files import file_of, warn_of_unsaved

# The number of tokens of each text that a digest depends on.
NUM_TOKENS = 6


def check_tokenizer(model, tokenizer, context_length=None):
    """Raises an error if a tokenizer does not match a model.

    The tokenizer is applied to a few fixed texts. It must give the ids that the model's
    own tokenizer gives, and must add the special tokens that the text tower needs.

    Args:
        model: A `ContrastiveModel`.
        tokenizer: See `image_text_dataset`.
        context_length: Integer, the length of token rows, for a tokenizer that supports
            any length. `None` uses the tokenizer's own length.
    """
    # Imported here: it needs packages that `import keras` does not.
    from keras_cluster_mask.data.tokenizing import probe

    ids = probe(tokenizer, context_length)
    if ids is None:
        # It accepts only the texts of its dataset.
        return
    try:
        model.input_rules.check_ids(ids)
    except ValueError as error:
        raise ValueError(f"`tokenizer` returns ids that do not fit: {error}") from None
    if model.text_tower.family.pooling == "highest id" and not _has_special_tokens(ids):
        raise ValueError(
            "`tokenizer` must add a start token to each text, and an end token that "
            "has the highest id, at which a CLIP text encoder pools. Pass a "
            "`kcm.data.CLIPTokenizer`, or `keras_hub.models.CLIPPreprocessor("
            "tokenizer)` for a tokenizer of keras_hub. "
            f"Received: tokenizer={tokenizer}, which starts with the ids "
            f"{ids[:, 0].tolist()}, and has the highest ids {ids.max(1).tolist()} "
            f"at {ids.argmax(1).tolist()}, for three sentences"
        )
    if tokenizer is not model.tokenizer:
        digest = digest_of(model, tokenizer)
        _check_digest(model, digest, f"tokenizer={tokenizer}")


def check_kind(tokenizer):
    """Raises an error for a tokenizer that cannot be applied to captions."""
    # Imported here: it needs packages that `import keras` does not.
    from keras_cluster_mask.data import tokenizing

    tokenizing.check_tokenizer(tokenizer)


def tokenizer_of(model, tokenizer=None):
    """Returns a function from texts to token ids, after checking the tokenizer.

    Args:
        model: A `ContrastiveModel`.
        tokenizer: See `image_text_dataset`. Defaults to the tokenizer of the model.
    """
    from keras_cluster_mask.data.tokenizing import length_of, tokenize

    if tokenizer is None:
        tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "`tokenizer` must be given to embed words, because the model has none: set "
            "`model.tokenizer` to the one that the model was trained with. A model is "
            "saved with its tokenizer. Received: tokenizer=None"
        )
    # The tokenizer's own length is the one used in training, which may be shorter than
    # the text tower's.
    lengths = [length_of(tokenizer), model.input_rules.context_length]
    length = min((x for x in lengths if x is not None), default=None)
    check_tokenizer(model, tokenizer, length)
    return functools.partial(tokenize, tokenizer, context_length=length)


def check_tokenizer_of(model, data):
    """Checks the tokenizer of an `image_text_dataset` or of `TowerFeatures`, if any.

    Returns:
        The tokenizer of the dataset, or `None`.
    """
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    elif hasattr(data, "tokenizer_digest"):
        _check_digest(model, data.tokenizer_digest, f"features in {data.folder}")
    return tokenizer


def adopt_tokenizer(model, data):
    """Checks the tokenizer of training data, and gives it to a model that has none.

    A tokenizer for longer texts replaces the model's own. A tokenizer that is not saved
    with the model causes a warning.
    """
    tokenizer = check_tokenizer_of(model, data)
    lengths = [getattr(x, "context_length", 0) for x in (model.tokenizer, tokenizer)]
    is_longer = all(lengths) and lengths[0] < lengths[1]
    if tokenizer is not None and (is_longer or model.tokenizer is None):
        model.tokenizer = tokenizer
    if model.tokenizer is not None and file_of(model.tokenizer) is None:
        warn_of_unsaved(model.tokenizer)


def digest_of(model, tokenizer):
    """Hashes the token ids of fixed texts, as far as the text tower reads them.

    Tokenizers of different kinds, versions and lengths that give the same ids have
    digests that start alike. That of a `CLIPTokenizer` also depends on its vocabulary.

    Args:
        model: A `ContrastiveModel`.
        tokenizer: See `image_text_dataset`, or `None`.

    Returns:
        String, or `None` for a tokenizer that does not accept arbitrary texts.
    """
    if tokenizer is None:
        return None
    from keras_cluster_mask.data.tokenizing import VARIANTS, length_of, probe

    # Shorter rows would not hold all tokens that the digest depends on.
    lengths = length_of(tokenizer), model.input_rules.context_length, NUM_TOKENS + 2
    length = max(x for x in lengths if x is not None)
    if hasattr(tokenizer, "with_context_length"):
        tokenizer = tokenizer.with_context_length(length)
    parts = [probe(tokenizer, length), probe(tokenizer, length, VARIANTS)]
    if parts[0] is None:
        return None
    rows = []
    for part in parts:
        # A tokenizer with a small vocabulary may support plain words only.
        if part is None:
            continue
        for row in without_padding(model.text_tower.family, part, xp=np):
            # Only the first ids, since another length truncates the texts, and the end.
            read = row[row >= 0].tolist()
            rows.append([*read[:NUM_TOKENS], *read[-1:]])
    vocabulary = getattr(tokenizer, "vocabulary_digest", "")
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16] + vocabulary


def _check_digest(model, digest, received):
    """Raises an error for a digest other than that of the model's tokenizer."""
    expected = digest_of(model, model.tokenizer)
    # Those of two kinds have only the first part in common.
    known = zip(digest or (), expected or ())
    if any(x != y for x, y in known):
        raise ValueError(
            "`tokenizer` must give the token ids that the tokenizer of the model gives;"
            " to change it on purpose, set `model.tokenizer` to another one or to "
            f"`None`. Received: {received}, and a model with {model.tokenizer}"
        )


def _has_special_tokens(ids):
    """Returns whether sentences start with the same id and end with the highest id."""
    ends = ids.argmax(axis=1)
    are_same = not np.ptp(ids[:, 0]) and not np.ptp(ids.max(axis=1))
    # Only padding, all of one id, may follow the end token.
    after = np.concatenate([row[end + 1 :] for row, end in zip(ids, ends)])
    # The first text is a single word, so ids that repeat before its end token are
    # padding.
    is_filled = ends[0] > 1 and ids[0, ends[0] - 1] == ids[0, ends[0] - 2]
    return bool(
        are_same and ends.all() and len(np.unique(after)) <= 1 and not is_filled
    )
