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
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.training.features import TowerFeatures

LAYER_FILE, CLIP_FILE = "tokenizer_layer.json", "clip_tokenizer.json"
HUGGING_FACE_FILE = "tokenizer_config.json"
# The folder in a preset for what keras_hub does not read.
PRESET_FOLDER = "keras_cluster_mask"
# The file by which keras_hub knows that a preset has a tokenizer.
TOKENIZER_FILE = "tokenizer.json"
HUGGING_FACE_ADDRESS = "hf://"
# The files of a preset that a tokenizer may need, without weights.
NEEDED = ["*.json", "*.model", "assets/*", f"{PRESET_FOLDER}/*"]
# Entries of a configuration that do not decide the ids of a text. Each call of a
# tokenizer of Hugging Face sets the last two.
UNRELATED = (
    *("name", "dtype", "build_config", "sequence_length", "output_sequence_length"),
    *("truncation", "padding"),
)


def check_kind(tokenizer):
    """Raises an error for a tokenizer that cannot be applied to captions."""
    # Imported here: it needs packages that `import keras` does not.
    from keras_cluster_mask.data import tokenizing

    tokenizing.check_tokenizer(tokenizer)


def check_matching_tokenizer(model, tokenizer):
    """Raises an error if a tokenizer does not match a model.

    Its configuration must be equal to the configuration of the model's own tokenizer,
    except for the length of rows. Functions must be the same.

    Args:
        model: A `ContrastiveModel`.
        tokenizer: See `image_text_dataset`.
    """
    check_kind(tokenizer)
    pooling, expected = model.text_tower.family.pooling, model.tokenizer
    # A `CLIPTokenizer` has an end token, and a function may only take known captions.
    is_clip = hasattr(tokenizer, "vocabulary_digest")
    if pooling == "highest id" and not is_clip and config_of(tokenizer):
        _check_end_token(tokenizer, model.input_rules.context_length)
    if expected is not None and tokenizer != expected:
        config = config_of(tokenizer)
        is_same = config and config == config_of(expected)
        _check_same(model, is_same, f"tokenizer={tokenizer}")


def _check_end_token(tokenizer, context_length):
    """Raises an error for a tokenizer without the token at which CLIP pools."""
    from keras_cluster_mask.data.tokenizing import tokenize

    ids = tokenize(tokenizer, ["", "a dog"], context_length)
    ends = ids.argmax(axis=1)
    if np.ptp(ids.max(axis=1)) or not 0 < ends[0] < ends[1]:
        raise ValueError(
            "`tokenizer` must add a start token to each text, and an end token that "
            "has the highest id, at which a CLIP text encoder pools. Pass a "
            "`kcm.data.CLIPTokenizer`, or `keras_hub.models.CLIPPreprocessor("
            "tokenizer)` for a tokenizer of keras_hub. "
            f"Received: tokenizer={tokenizer}, with the ids {ids.tolist()} of '' and "
            "'a dog'"
        )


def _check_same(model, is_same, received):
    if not is_same:
        raise ValueError(
            "`tokenizer` must be equal to the tokenizer of the model, or the same "
            "function. To change the tokenizer on purpose, set `model.tokenizer` to "
            f"another tokenizer or to `None`. Received: {received}, and a model with "
            f"{model.tokenizer}"
        )


def tokenizer_of(model, tokenizer=None):
    """Returns a function from texts to token ids, after checking the tokenizer.

    Args:
        model: A `ContrastiveModel`.
        tokenizer: See `image_text_dataset`. Defaults to the tokenizer of the model.
    """
    from keras_cluster_mask.data.tokenizing import tokenize

    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError(
            "`tokenizer` must be given to embed strings, because the model has none: "
            "set `model.tokenizer` to the tokenizer that the model was trained with. A "
            "model is saved with its tokenizer. Received: tokenizer=None"
        )
    check_matching_tokenizer(model, tokenizer)
    length = model.input_rules.context_length
    return functools.partial(tokenize, tokenizer, context_length=length)


def check_data_tokenizer(model, data):
    """Checks the tokenizer of an `image_text_dataset` or of `TowerFeatures`, if any.

    Returns:
        The tokenizer of the dataset, or `None`.
    """
    # Data of the user's own may have attributes of these names.
    tokenizer = data.tokenizer if isinstance(data, Stream) else None
    if tokenizer is not None:
        check_matching_tokenizer(model, tokenizer)
    elif isinstance(data, TowerFeatures):
        known = data.tokenizer_digest, identity_of(model.tokenizer)
        is_same = None in known or known[0] == known[1]
        _check_same(model, is_same, f"features in {data.folder}")
    return tokenizer


def adopt_tokenizer(model, data):
    """Checks the tokenizer of training data, and gives it to a model that has none.

    A tokenizer for longer texts replaces the model's own. A tokenizer that is not saved
    with the model causes a warning.
    """
    tokenizer = check_data_tokenizer(model, data)
    lengths = [getattr(x, "context_length", 0) for x in (model.tokenizer, tokenizer)]
    is_longer = all(lengths) and lengths[0] < lengths[1]
    if tokenizer is not None and (is_longer or model.tokenizer is None):
        model.tokenizer = tokenizer
    if model.tokenizer is not None and file_of(model.tokenizer) is None:
        warn_of_unsaved(model.tokenizer)


def identity_of(tokenizer: Any) -> str | None:
    """Returns a string that is the same for equal tokenizers of two processes.

    It does not depend on the length of rows.

    Returns:
        The hash of the configuration, the name of a function, which has none, or `None`
        for no tokenizer.
    """
    if tokenizer is None:
        return None
    if (config := config_of(tokenizer)) is None:
        return getattr(tokenizer, "__qualname__", type(tokenizer).__qualname__)
    return hashlib.sha256(config.encode()).hexdigest()[:16]


def config_of(tokenizer: Any) -> str | None:
    """Returns what decides the ids of a text, as JSON, or `None` for a function."""
    from keras_cluster_mask.data.clip_tokenizer import CLIPTokenizer
    from keras_cluster_mask.data.tokenizing import is_layer, libraries_of

    content, inner = [type(tokenizer).__name__], getattr(tokenizer, "tokenizer", None)
    if isinstance(tokenizer, CLIPTokenizer):
        content += [tokenizer.vocabulary_digest]
    elif is_layer(tokenizer):
        # The config does not contain the vocabulary.
        words = getattr(inner or tokenizer, "get_vocabulary", list)()
        content += [keras.saving.serialize_keras_object(tokenizer), *words]
    elif "transformers" in libraries_of(tokenizer):
        # Tokenizers in Python have none.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
        content += [tokenizer.pad_token_id, words]
    elif "open_clip" in libraries_of(tokenizer) and hasattr(tokenizer, "clean_fn"):
        words = config_of(inner) if inner else tokenizer.encoder
        content += [tokenizer.clean_fn.__name__, words]
    else:
        return None
    related = json.loads(
        json.dumps(content),
        object_hook=lambda x: {k: v for k, v in x.items() if k not in UNRELATED},
    )
    return json.dumps(related, sort_keys=True)


# === Files ===


def file_of(tokenizer: Any) -> str | None:
    """Returns the name of the file from which a tokenizer is loaded, if it is saved."""
    # Imported here: they need packages that `import keras` does not.
    from keras_cluster_mask.data.clip_tokenizer import CLIPTokenizer
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
        from keras_cluster_mask.data.clip_tokenizer import CLIPTokenizer

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
    # An earlier tokenizer would be loaded in place of this one. A folder of this name
    # may also be the package.
    names = LAYER_FILE, CLIP_FILE, HUGGING_FACE_FILE
    if any((path / name).is_file() for name in names):
        shutil.rmtree(path)
    for name in (TOKENIZER_FILE, "preprocessor.json"):
        pathlib.Path(folder, name).unlink(missing_ok=True)
    if hasattr(tokenizer, "save_to_preset"):
        tokenizer.save_to_preset(folder)
    else:
        save_tokenizer(tokenizer, path)


def load_from_preset(preset: str, backbone: keras.Model) -> Any:
    """Loads the tokenizer of a preset, or returns `None` if it has none.

    Args:
        preset: String, the name of a preset, a folder or an `"hf://..."` address.
        backbone: The backbone of the preset.
    """
    if preset.startswith(HUGGING_FACE_ADDRESS):
        from huggingface_hub import snapshot_download

        # keras_hub downloads files one by one, and only those that it knows.
        repository = preset.removeprefix(HUGGING_FACE_ADDRESS)
        preset = snapshot_download(repository, allow_patterns=NEEDED)
    folder = pathlib.Path(preset)
    found = load_tokenizer(folder / PRESET_FOLDER)
    if found is not None or (
        folder.is_dir() and not (folder / TOKENIZER_FILE).exists()
    ):
        return found
    kind = import_keras_hub().models.CausalLMPreprocessor
    if type(backbone).__name__ == "CLIPBackbone":
        from keras_cluster_mask.data.clip_tokenizer import CLIPTokenizer as kind
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
    from keras_cluster_mask.data.clip_tokenizer import CLIPTokenizer

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
