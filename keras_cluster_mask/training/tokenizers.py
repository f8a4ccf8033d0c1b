"""The tokenizer of a model: checked against the text tower, saved and loaded.

| Tokenizer | Saved as |
| --- | --- |
| Keras layer, such as a preprocessor of keras_hub | config; Keras saves its assets |
| `CLIPTokenizer` | the file that its `save` writes |
| tokenizer of Hugging Face | the files that its `save_pretrained` writes |
| any other callable | not saved, with a warning |
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

import keras
import numpy as np

from keras_cluster_mask.distribution.backends import import_keras_hub
from keras_cluster_mask.losses import without_padding
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.training.features import TowerFeatures

# The number of tokens of each text that a digest depends on.
NUM_TOKENS = 6
LAYER_FILE, CLIP_FILE = "tokenizer_layer.json", "clip_tokenizer.json"
HUGGING_FACE_FILE = "tokenizer_config.json"
# The folder in a preset for what keras_hub does not read.
PRESET_FOLDER = "keras_cluster_mask"
# The file by which keras_hub knows that a preset has a tokenizer.
TOKENIZER_FILE = "tokenizer.json"


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
    # Data of the user's own may have attributes of these names.
    tokenizer = data.tokenizer if isinstance(data, Stream) else None
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    elif isinstance(data, TowerFeatures):
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
    digests with the same start. The digest of a `CLIPTokenizer` also depends on its
    vocabulary.

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
    """Raises an error for a digest that differs from the model's tokenizer."""
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


# === Files ===


def file_of(tokenizer: Any) -> str | None:
    """Returns the name of the file from which a tokenizer is loaded, if it is saved."""
    # Imported here: they need packages that `import keras` does not.
    from keras_cluster_mask.data.tokenizers import CLIPTokenizer
    from keras_cluster_mask.data.tokenizing import is_layer, libraries_of

    if is_layer(tokenizer):
        return LAYER_FILE
    # A subclass may do more than the vocabulary says.
    if type(tokenizer) is CLIPTokenizer:
        return CLIP_FILE
    return HUGGING_FACE_FILE if "transformers" in libraries_of(tokenizer) else None


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Writes a tokenizer for `load_tokenizer`, or warns that it is not saved."""
    folder, name = pathlib.Path(folder), file_of(tokenizer)
    # A run must not end when it saves its model after an epoch.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if name == LAYER_FILE:
            config = keras.saving.serialize_keras_object(tokenizer)
            (folder / name).write_text(json.dumps(config))
        elif name == CLIP_FILE:
            tokenizer.save(folder / name)
        elif name == HUGGING_FACE_FILE:
            tokenizer.save_pretrained(folder)
        else:
            warn_of_unsaved(tokenizer)
    except Exception as error:
        warn_of_unsaved(f"{tokenizer}, {error!r}")


def warn_of_unsaved(received: Any) -> None:
    """Warns that a tokenizer is not saved with its model."""
    warnings.warn(
        "The tokenizer is not saved with the model: set `model.tokenizer` of the "
        "loaded model, or use a `CLIPTokenizer`, a preprocessor of keras_hub or a "
        f"tokenizer of Hugging Face. Received: tokenizer={received}",
        stacklevel=5,
    )


def load_tokenizer(folder: str | os.PathLike) -> Any:
    """Loads what `save_tokenizer` or Hugging Face's `save_pretrained` wrote.

    The assets of a Keras layer are not loaded.

    Returns:
        The tokenizer; `None` if there is none, or if it cannot be loaded, which causes
        a warning.
    """
    return _or_warn(_load, pathlib.Path(folder))


def _or_warn(load, *arguments):
    """Returns a loaded tokenizer, or warns: a model embeds images and ids without."""
    try:
        return load(*arguments)
    except Exception as error:
        warnings.warn(
            "The tokenizer that was saved with the model could not be loaded: install "
            "the package that the tokenizer is from, such as transformers, and load "
            "the model again, or set `model.tokenizer`. Received: "
            f"{type(error).__name__}: {error}",
            stacklevel=4,
        )
        return None


def _load(folder):
    if (path := folder / LAYER_FILE).is_file():
        # It registers the classes of its layers.
        import_keras_hub()
        return keras.saving.deserialize_keras_object(json.loads(path.read_text()))
    if (path := folder / CLIP_FILE).is_file():
        from keras_cluster_mask.data.tokenizers import CLIPTokenizer

        return CLIPTokenizer.from_file(path)
    if (folder / HUGGING_FACE_FILE).is_file():
        import transformers

        # No code of the folder is run, and nothing is downloaded.
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    return None


# === Presets of keras_hub ===


def save_in_preset(tokenizer: Any, folder: str) -> None:
    """Writes a tokenizer into a preset, for keras_hub if it can read the tokenizer."""
    path = pathlib.Path(folder, PRESET_FOLDER)
    # An earlier tokenizer would be loaded in place of this one.
    shutil.rmtree(path, ignore_errors=True)
    for name in (TOKENIZER_FILE, "preprocessor.json"):
        pathlib.Path(folder, name).unlink(missing_ok=True)
    if hasattr(tokenizer, "save_to_preset"):
        tokenizer.save_to_preset(folder)
    else:
        save_tokenizer(tokenizer, path)


def load_from_preset(preset: str, backbone: keras.Model) -> Any:
    """Loads the tokenizer of a preset, or returns `None` if it has none.

    Args:
        preset: String, the name of a preset or a folder.
        backbone: The backbone of the preset.
    """
    folder = pathlib.Path(preset)
    found = load_tokenizer(folder / PRESET_FOLDER)
    if found is not None or (
        folder.is_dir() and not (folder / TOKENIZER_FILE).exists()
    ):
        return found
    kind = import_keras_hub().models.CausalLMPreprocessor
    if type(backbone).__name__ == "CLIPBackbone":
        from keras_cluster_mask.data.tokenizers import CLIPTokenizer as kind
    return _or_warn(kind.from_preset, preset)


# === Checkpoints of other libraries ===


def load_beside_weights(
    folder: pathlib.Path | None, kind: str | None, context_length: int
) -> Any:
    """Loads the tokenizer of a model of open_clip or Hugging Face.

    Args:
        folder: The folder of the weights, or `None`.
        kind: `"clip"`: OpenAI's vocabulary, from the folder or from the package
            open_clip. `"hugging_face"`: the folder's files of Hugging Face. Or `None`.
        context_length: Integer, the context length of the text encoder.

    Returns:
        As `load_tokenizer`.
    """
    from keras_cluster_mask.data.tokenizers import CLIPTokenizer

    found = None
    has_merges = bool(kind and folder) and (folder / "merges.txt").is_file()
    if has_merges:
        # The files of a CLIP, which need no further package.
        paths = folder / "vocab.json", folder / "merges.txt"
        found = _or_warn(CLIPTokenizer.from_vocabulary, *paths, context_length)
    elif kind and folder:
        found = load_tokenizer(folder)
    if kind == "clip" and found is None and not has_merges:
        # The package need not be installed.
        with contextlib.suppress(ImportError):
            found = CLIPTokenizer.from_open_clip(context_length)
    if hasattr(found, "model_max_length"):
        found.model_max_length = min(found.model_max_length, context_length)
    return found
