"""Saves the tokenizer of a model with the model, and loads it.

| Tokenizer | Saved as |
| --- | --- |
| Keras layer, such as a preprocessor of keras_hub | config; Keras saves its assets |
| `CLIPTokenizer` | the file that its `save` writes |
| tokenizer of Hugging Face | the files that its `save_pretrained` writes |
| any other callable | not saved, with a warning |
"""

import contextlib
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

import keras

from keras_cluster_mask.distribution.backends import import_keras_hub

LAYER_FILE, CLIP_FILE = "tokenizer_layer.json", "clip_tokenizer.json"
HUGGING_FACE_FILE = "tokenizer_config.json"
# The folder in a preset for what keras_hub does not read.
PRESET_FOLDER = "keras_cluster_mask"
# The file by which keras_hub knows that a preset has a tokenizer.
TOKENIZER_FILE = "tokenizer.json"


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
        context_length: Integer, that of the text encoder.

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
