"""Applies any tokenizer to a batch of captions."""

import inspect
import sys
import threading
import weakref
from collections.abc import Mapping

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from keras_cluster_mask.data.clip_tokenizer import as_text

# Hugging Face uses a larger number if the length is unknown.
MAX_LENGTH = 100_000
# Few tokenizers are thread-safe: calls of one of Hugging Face change its settings.
_calling = threading.RLock()
# For each `WordPieceTokenizer` of keras_hub, its vocabulary and `word_pieces` of it.
_word_pieces = weakref.WeakKeyDictionary()


def is_layer(tokenizer):
    """Returns whether a tokenizer is a Keras layer."""
    return "keras" in libraries_of(tokenizer)


def check_tokenizer(tokenizer):
    """Raises an error for a tokenizer that cannot be applied to captions."""
    if is_layer(tokenizer) and hasattr(tokenizer, "end_token_id"):
        raise ValueError(
            "`tokenizer` must add a start and an end token and return rows of equal "
            "length, which this layer does not do. Pass its preprocessor, such as "
            "`keras_hub.models.CLIPPreprocessor(tokenizer)`, or "
            f"`CLIPTokenizer.from_preset(...)` instead. Received: tokenizer={tokenizer}"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise ValueError(
            "`tokenizer` must be a callable that maps a list of str to token ids, or "
            f"None. Received: tokenizer={tokenizer!r}"
        )
    is_hugging_face = "transformers" in libraries_of(tokenizer)
    if is_hugging_face and not hasattr(tokenizer, "model_max_length"):
        raise ValueError(
            "`tokenizer` must be a tokenizer, not a processor: pass "
            f"`processor.tokenizer`. Received: {type(tokenizer).__name__}"
        )


def length_of(tokenizer):
    """Returns the length of the rows of a tokenizer, or `None` if it is unknown."""
    length = getattr(tokenizer, "context_length", None)
    if length is None and "transformers" in libraries_of(tokenizer):
        length = tokenizer.model_max_length
        length = length if length < MAX_LENGTH else None
    return length


def tokenize(tokenizer, captions, context_length=None):
    """Converts captions to token ids.

    Args:
        tokenizer: Callable from a list of strings to integers, such as a
            `CLIPTokenizer`; a tokenizer of open_clip or Hugging Face; or a Keras layer.
        captions: List of bytes or strings.
        context_length: Integer. The maximum length of the rows of a tokenizer of
            open_clip or Hugging Face. `None`: its own.

    Returns:
        int32 array `(batch, length)`.
    """
    if not captions:
        return np.zeros((0, getattr(tokenizer, "context_length", 0)), "int32")
    texts, libraries = [*map(as_text, captions)], libraries_of(tokenizer)
    known = [x for x in (context_length, length_of(tokenizer)) if x is not None]
    length, options = min(known, default=None), {}
    if "open_clip" in libraries and length:
        options = {"context_length": length}
    if "transformers" in libraries:
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        if length is None:
            raise ValueError(
                "`tokenizer` must define a maximum length: set its `model_max_length` "
                "to the context length of the model. Received: "
                f"{type(tokenizer).__name__} with "
                f"model_max_length={tokenizer.model_max_length}"
            )
    with _calling:
        if is_layer(tokenizer):
            token_ids = _apply_layer(tokenizer, texts)
        else:
            token_ids = tokenizer(texts, **options)
    if isinstance(token_ids, Mapping):
        token_ids = token_ids["input_ids"]
    token_ids = np.asarray(token_ids)
    fits = token_ids.ndim == 2 and len(token_ids) == len(captions)
    if not fits or token_ids.dtype.kind not in "iu":
        raise ValueError(
            "`tokenizer` must return ints of shape (batch, length). Received: "
            f"{token_ids.dtype} of shape {token_ids.shape} for {len(captions)} captions"
        )
    return token_ids.astype("int32")


def libraries_of(tokenizer):
    """Returns the packages that define a tokenizer's function, or class and bases."""
    modules = {x.__module__ for x in type(tokenizer).__mro__}
    # The type of a function does not tell its package.
    modules.add(getattr(tokenizer, "__module__", None) or "")
    return {module.split(".")[0] for module in modules}


# === Keras layers ===


def _apply_layer(layer, texts):
    # A subclass of the user's may do more than to tokenize and pack.
    if type(layer).__module__.startswith("keras_hub."):
        hub = sys.modules["keras_hub"]
        kinds = (
            hub.models.TextEmbedderPreprocessor,
            hub.models.TextClassifierPreprocessor,
        )
        if isinstance(layer, kinds):
            if layer.packer is None:
                # The first call makes it.
                layer([""])
            if type(layer.packer) is hub.layers.MultiSegmentPacker:
                return _pack(layer.packer, _ids_of(layer.tokenizer, texts))
    # Imported here: it needs Keras, which worker processes do not.
    from keras_cluster_mask.batches import as_array

    # Without TensorFlow, keras_hub's preprocessors take lists.
    tf = sys.modules.get("tensorflow")
    texts = texts if tf is None else tf.convert_to_tensor(texts, "string")
    # KerasHub's image-text preprocessors take a dict, and text preprocessors strings.
    if "image_converter" in inspect.signature(type(layer)).parameters:
        texts = {"images": None, "prompts": texts}
    ids = layer(texts)
    return as_array(ids["token_ids"] if isinstance(ids, dict) else ids)


def _pack(packer, rows):
    """Packs lists of ids as a `MultiSegmentPacker`, which takes 2 ms for 256 ids."""
    start, end, length = packer.start_value, packer.end_value, packer.sequence_length
    packed = np.full((len(rows), length), packer.pad_value, "int32")
    for row, ids in zip(packed, rows):
        ids = [*start, *ids[: length - len(start) - len(end)], *end]
        row[: len(ids)] = ids
    return packed


def _ids_of(tokenizer, texts):
    """Returns lists of ids, without special tokens, from a tokenizer of keras_hub.

    The package tokenizers finds the word pieces of ASCII texts. keras_hub folds and
    splits other letters in its own way.
    """
    if (
        not isinstance(
            tokenizer, sys.modules["keras_hub"].tokenizers.WordPieceTokenizer
        )
        or not type(tokenizer).__module__.startswith("keras_hub.")
        or tokenizer.special_tokens_in_strings
        or tokenizer.sequence_length
    ):
        return tokenizer(texts)
    plain, others = ([x for x in texts if x.isascii() is y] for y in (True, False))
    plain = iter(word_pieces(tokenizer).encode_batch_fast(plain))
    others = iter(tokenizer(others) if others else ())
    return [next(plain).ids if x.isascii() else next(others) for x in texts]


def word_pieces(tokenizer):
    """Returns a `WordPieceTokenizer` of keras_hub as one of the package tokenizers.

    Both give equal ids for ASCII texts.
    """
    words, made = _word_pieces.get(tokenizer, (None, None))
    if words is not tokenizer.vocabulary:
        words = tokenizer.vocabulary
        made = Tokenizer(
            models.WordPiece(
                dict(zip(words, range(len(words)))),
                unk_token=tokenizer.oov_token,
                # The limit of keras_hub and TensorFlow Text.
                max_input_chars_per_word=100,
                continuing_subword_prefix=tokenizer.suffix_indicator,
            )
        )
        if tokenizer.lowercase:
            made.normalizer = normalizers.Lowercase()
        # White space and control characters, and punctuation.
        parts = (r"[\x00-\x20\x7f]", "removed"), (r"[!-/:-@\[-`{-~]", "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(x), how) for x, how in parts]
        )
        _word_pieces[tokenizer] = words, made
    return made
