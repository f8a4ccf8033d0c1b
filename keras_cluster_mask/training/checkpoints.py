"""Checkpoint files with the state of a training run, on local or remote storage."""

import concurrent.futures
import contextlib
import json
import os
import warnings
import zipfile

import ml_dtypes
import numpy as np

from keras_cluster_mask.distribution.processes import all_gather_object

PREFIX, SUFFIX, PART = "epoch-", ".npz", ".part"

# The background thread that writes to all folders, and its pending writes.
_WRITER = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
_WRITING = []


def finish_writing():
    """Waits until all pending checkpoints, in any folder, are written.

    Raises:
        OSError: If a file cannot be written. Other errors of the background thread are
            raised too.
    """
    while _WRITING:
        concurrent.futures.wait(_WRITING[:1])
        _WRITING.pop(0).result()


def finish_writing_everywhere():
    """Calls `finish_writing` in all processes, which all raise an error if one does."""
    error = writing_error()
    if any(all_gather_object(int(error is not None))):
        raise error or OSError(
            "Checkpoints must be written before training continues. Received: an error "
            "in another process, which says what happened"
        )


def writing_error() -> Exception | None:
    """Waits like `finish_writing`, and returns its error or `None`."""
    try:
        finish_writing()
    except Exception as error:
        return error
    return None


class CheckpointFiles:
    """Checkpoints in a folder, named after the epochs trained: `epoch-00042.npz`.

    Each file is written under a temporary name and then renamed, so a reader or a
    killed run finds a complete file or none. Reading waits for this process's pending
    writes, and raises their errors.

    Args:
        folder: str or path, local or a URL such as `"gs://bucket/run"`. Created if it
            does not exist.
        keep: Integer, the number of latest checkpoints to keep.
    """

    def __init__(self, folder, keep=1):
        self.folder = os.path.expanduser(os.fspath(folder)).rstrip("/")
        self.keep = keep
        # Fail before training if the storage cannot be reached.
        _storage().file_system(self.folder, "directory")

    def start_writing(self, arrays, facts):
        """Writes a checkpoint in the background, after pending ones; returns at once.

        Args:
            arrays: Dictionary of arrays, which must not change until it is written.
            facts: Dictionary of JSON values. Its `"epoch"` names the file.
        """
        _WRITING.append(_WRITER.submit(self.write, arrays, facts))

    def write(self, arrays, facts) -> str:
        """Writes a checkpoint, then removes the oldest ones beyond `keep`."""
        path = self._path(f"{PREFIX}{facts['epoch']:05}{SUFFIX}")
        arrays = dict(arrays)
        # NumPy's files do not support bfloat16.
        halves = [k for k, v in arrays.items() if v.dtype == ml_dtypes.bfloat16]
        arrays.update({key: arrays[key].view("uint16") for key in halves})
        facts = json.dumps({**facts, "bfloat16": halves})
        arrays["facts"] = np.frombuffer(facts.encode(), "uint8")
        with _storage().replacing(path) as file:
            np.savez(file, **arrays)
        self._sync_folder()
        for old in self._paths()[: -self.keep]:
            _remove(old)
        return path

    def paths(self) -> list[str]:
        """Returns the paths of the checkpoints, from oldest to newest."""
        finish_writing()
        return self._paths()

    def _paths(self):
        names = [x for x in self._names() if x.startswith(PREFIX)]
        return [self._path(x) for x in sorted(names) if x.endswith(SUFFIX)]

    def last_epoch(self) -> int:
        """Returns the number of epochs of the last checkpoint, or -1 without one."""
        paths = self.paths()
        if not paths:
            return -1
        return int(paths[-1].rpartition(PREFIX)[2].removesuffix(SUFFIX))

    def read_last(self):
        """Reads the last intact checkpoint: `(path, arrays, facts)`, or `None`.

        Damaged files are renamed, with a warning.
        """
        finish_writing()
        for name in self._names():
            if name.startswith(".") and name.endswith(PART):
                _remove(self._path(name))
        for path in reversed(self.paths()):
            try:
                return path, *read_checkpoint(path)
            except FileNotFoundError:
                # Another process found it damaged, and renamed it.
                continue
            except (EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
                system, name = _storage().file_system(path)
                # Another process may have been first.
                with contextlib.suppress(FileNotFoundError):
                    system.mv(name, f"{name}.damaged")
                warnings.warn(
                    f"The checkpoint {path} cannot be read ({error}); trying the one "
                    f"before. The file is now {path}.damaged.",
                    stacklevel=2,
                )
        return None

    def _path(self, name):
        return f"{self.folder}/{name}"

    def _names(self):
        """Returns the names of all files in the folder."""
        system, folder = _storage().file_system(self.folder)
        # Clients of object stores cache listings.
        system.invalidate_cache(folder)
        try:
            found = system.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return [path.rpartition("/")[2] for path in found]

    def _sync_folder(self):
        # Without this, a power loss may undo the renaming. Windows cannot open folders.
        if _storage().is_address(self.folder) or not hasattr(os, "O_DIRECTORY"):
            return
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_checkpoint(path) -> tuple[dict, dict]:
    """Reads the arrays and the facts of a checkpoint."""
    with (
        _storage().open_file(path) as content,
        np.load(content, allow_pickle=False) as file,
    ):
        arrays = {key: file[key] for key in file.files}
    facts = json.loads(arrays.pop("facts").tobytes())
    for key in facts.pop("bfloat16"):
        arrays[key] = arrays[key].view(ml_dtypes.bfloat16)
    return arrays, facts


def read_resumable(path: str | os.PathLike):
    """Reads the checkpoint to resume from, the same one in all processes.

    Args:
        path: Path or URL of a checkpoint, which must exist, or of a folder.

    Returns:
        A tuple `(path, arrays, facts)`, or `None` if the folder has no checkpoint.
    """
    files, path = _storage(), os.path.expanduser(os.fspath(path)).rstrip("/")
    files.file_system(path, "resume_from")
    is_file = path.endswith(SUFFIX) or files.exists(f"{path}{SUFFIX}")
    # The main process may still be writing the checkpoint that all processes read.
    finish_writing()
    all_gather_object(0)
    if not is_file:
        found = CheckpointFiles(path).read_last()
    else:
        found = (path, *read_checkpoint(path)) if files.exists(path) else None
    epochs = all_gather_object(-1 if found is None else found[2]["epoch"])
    if is_file and -1 in epochs:
        raise FileNotFoundError(
            "`resume_from` must be a checkpoint that exists, or a folder. "
            f"Received: resume_from={path}"
        )
    if len({*epochs}) > 1:
        raise ValueError(
            "`resume_from` must be a folder that all processes see. Received: "
            f"resume_from={path}, last epochs {epochs} by process"
        )
    return found


def _remove(path):
    # Another process may have been first.
    with contextlib.suppress(FileNotFoundError):
        _storage().remove(path)


def _storage():
    # Imported when used, since it needs packages that Keras does not.
    from keras_cluster_mask.data import files

    return files
