"""Reads weight files of safetensors and torch, and writes safetensors files."""

import contextlib
import importlib
import json
import os
import pathlib
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

INDEX = ".index.json"
SAFETENSORS, TORCH = ".safetensors", (".pt", ".pth", ".bin")
# In earlier versions, a file can run code in spite of `weights_only`: CVE-2025-32434
# (before 2.6) and CVE-2026-24747 (before 2.10).
SAFE_TORCH = 2, 10


def read_weights(path: pathlib.Path) -> Any:
    """Reads a file of weights, without running code that is in it.

    Args:
        path: Path that ends in `.safetensors`, `.pt`, `.pth` or `.bin`; or in
            `.index.json`, for a model in several of these files.

    Returns:
        A dictionary of NumPy arrays for safetensors; the object in the file for torch.

    Raises:
        ImportError: For a torch file, without torch or with a version that reads files
            unsafely.
        ValueError: If the file is damaged, of another kind, or contains code.
    """
    if path.name.endswith(INDEX):
        with _read_errors(path):
            names = {*json.loads(path.read_text())["weight_map"].values()}
            shards = [path.with_name(name) for name in sorted(names)]
        return {key: x for shard in shards for key, x in read_weights(shard).items()}
    if path.suffix not in (SAFETENSORS, *TORCH):
        raise ValueError(
            "`source` must end in .safetensors, .pt, .pth or .bin. "
            f"Received: source={str(path)!r}"
        )
    if path.suffix == SAFETENSORS:
        safetensors = _library("safetensors.numpy", path)
        with _read_errors(path):
            return safetensors.load_file(path)
    torch = _library("torch", path)
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < SAFE_TORCH:
        raise ImportError(
            f"`source` is a {path.suffix} file, which can run code when torch before "
            "2.10 reads it: `pip install -U torch`, or pass a .safetensors file. "
            f"Received: source={str(path)!r}, torch {torch.__version__}"
        )
    with _read_errors(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def find_weights(source: Any, names: tuple[str, ...]) -> Any:
    """Returns the path of a file of weights; a state dict is returned unchanged.

    Args:
        source: Path of a file or of a folder, or a state dict.
        names: The possible names of the file in a folder. The first one found is used.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = pathlib.Path(source).expanduser()
    paths = [path / name for name in names] if path.is_dir() else [path]
    found = next(filter(pathlib.Path.is_file, paths), None)
    if found is None:
        raise FileNotFoundError(
            f"`source` must be a file that exists, or a folder with one of {[*names]}. "
            "Names and tags, such as 'laion2b_s34b_b79k', are not downloaded: "
            "`huggingface_hub.snapshot_download('laion/CLIP-ViT-B-32-laion2B-s34B-b79K'"
            ")` returns such a folder. "
            f"Received: source={str(path)!r}"
        )
    return found


def write_weights(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a file.

    Args:
        path: Path that ends in `.safetensors`.
        arrays: Dictionary of NumPy arrays.
    """
    if path.suffix != SAFETENSORS:
        raise ValueError(
            f"`path` must end in .safetensors. Received: path={str(path)!r}"
        )
    content = _library("safetensors.numpy", path).save(arrays, {"format": "pt"})
    path.parent.mkdir(parents=True, exist_ok=True)
    # An interruption must not destroy a file that is replaced.
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _read_errors(path):
    """Raises an error that says why a file cannot be read."""
    try:
        yield
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        # torch's reader raises errors of any type for bytes that are not a pickle.
        found = type(error).__name__, *str(error).splitlines()[:1]
        reason = f"cannot be read: it is damaged or in another format {found}."
        # torch's own message recommends reading such files anyway.
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            reason = (
                "holds Python objects other than tensors, and reading those can run "
                "any code that the file's author put there, so it was not read. If you "
                "trust its author, save only the tensors of `torch.load(path, "
                "weights_only=False)` to a new file."
            )
        elif isinstance(error, RuntimeError) and "TorchScript" in str(error):
            reason = (
                "is a TorchScript program, as OpenAI's own files are, and not a state "
                "dict. If you trust its author, save `torch.jit.load(path, "
                '"cpu").state_dict()` to a new file.'
            )
        raise ValueError(f"`source` {reason} Received: source={str(path)!r}") from error


def _library(name, path):
    """Imports the library of a file's format, since each works without the other."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        name = name.partition(".")[0]
        raise ImportError(
            f"{path.suffix} files need {name}: `pip install {name}`. "
            f"Received: {str(path)!r}"
        ) from error
