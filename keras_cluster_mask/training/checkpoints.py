"""Checkpoint files with the state of a training run, on local or remote storage."""

import json
import os
import zipfile

import numpy as np

from keras_cluster_mask.distribution.processes import all_gather_object

PREFIX, SUFFIX = "epoch-", ".npz"


class CheckpointFiles:
    """Checkpoints in a folder, named after the epochs trained: `epoch-00042.npz`.

    Each file is written under a temporary name and then renamed, so a reader or a
    killed run finds a complete file or none.

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

    def write(self, arrays, facts) -> str:
        """Writes a checkpoint, then removes the oldest ones beyond `keep`.

        Args:
            arrays: Dictionary of arrays.
            facts: Dictionary of JSON values. Its `"epoch"` names the file.
        """
        path = f"{self.folder}/{PREFIX}{facts['epoch']:05}{SUFFIX}"
        # NumPy's files do not support bfloat16, whose values float32 holds exactly.
        arrays = {
            key: x.astype("float32") if x.dtype.name == "bfloat16" else x
            for key, x in arrays.items()
        }
        with _storage().replacing(path) as file:
            np.savez(file, facts=np.array(json.dumps(facts)), **arrays)
        # A killed run leaves the temporary file that it was writing.
        for old in [*self.paths()[: -self.keep], *self._find(".", ".part")]:
            _storage().remove(old)
        return path

    def paths(self) -> list[str]:
        """Returns the paths of the checkpoints, from oldest to newest."""
        return self._find(PREFIX, SUFFIX)

    def last_epoch(self) -> int:
        """Returns the number of epochs of the last checkpoint, or -1 without one."""
        paths = self.paths()
        if not paths:
            return -1
        return int(paths[-1].rpartition(PREFIX)[2].removesuffix(SUFFIX))

    def _find(self, start, end):
        system, folder = _storage().file_system(self.folder)
        # Clients of object stores cache listings.
        system.invalidate_cache(folder)
        try:
            found = system.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        names = sorted(path.rpartition("/")[2] for path in found)
        names = [x for x in names if x.startswith(start) and x.endswith(end)]
        return [f"{self.folder}/{name}" for name in names]


def read_resumable(path: str | os.PathLike):
    """Reads the checkpoint to resume from, the same one in all processes.

    Args:
        path: Path or URL of a checkpoint, which must exist, or of a folder.

    Returns:
        A tuple `(path, arrays, facts)`, or `None` if the folder has no checkpoint.
    """
    path = os.path.expanduser(os.fspath(path)).rstrip("/")
    _storage().file_system(path, "resume_from")
    paths = [path] if path.endswith(SUFFIX) else CheckpointFiles(path).paths()
    if not paths and path.endswith((".keras", ".h5")):
        raise ValueError(
            "`resume_from` must be the folder of a `kcm.callbacks.Checkpoint`, or one "
            f"of its .npz files. Received: resume_from={path}"
        )
    found = _read(paths[-1]) if paths else None
    epochs = all_gather_object(-1 if found is None else found[2]["epoch"])
    if len({*epochs}) > 1:
        raise ValueError(
            "`resume_from` must be a folder that all processes see. Received: "
            f"resume_from={path}, last epochs {epochs} by process"
        )
    return found


def _read(path):
    try:
        with (
            _storage().open_file(path) as content,
            np.load(content, allow_pickle=False) as file,
        ):
            arrays = dict(file)
        return path, arrays, json.loads(str(arrays.pop("facts")))
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            "`resume_from` must be an intact checkpoint: remove this file to resume "
            f"from the one before. Received: {path}, and then: {error}"
        ) from error


def _storage():
    # Imported when used, since it needs packages that Keras does not.
    from keras_cluster_mask.data import files

    return files
