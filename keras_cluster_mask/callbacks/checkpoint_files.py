"""Files of one folder that are there whole or not at all."""

import json
import os
import pathlib
import warnings
import zipfile

import ml_dtypes
import numpy as np

PREFIX, BEST, SUFFIX = "step-", "best", ".npz"


class CheckpointFiles:
    """Checkpoints `step-000000042.npz` in a folder, and `best.npz` of them.

    Args:
        folder: str or path. Made if it does not exist.
        keep: Integer, how many of the last there may be; `best` is kept besides.
    """

    def __init__(self, folder, keep):
        self.folder = pathlib.Path(folder)
        self.keep = keep

    def write(self, step, arrays, facts):
        """Writes a checkpoint, then removes those that are too many.

        A reader, or a run that is killed at any moment, finds either the whole file
        or none: it is written beside its place and then renamed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{PREFIX}{step:09}{SUFFIX}"
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        arrays = dict(arrays)
        # NumPy's files do not know bfloat16.
        halves = [k for k, v in arrays.items() if v.dtype == ml_dtypes.bfloat16]
        arrays.update({key: arrays[key].view("uint16") for key in halves})
        facts = json.dumps({**facts, "bfloat16": halves})
        arrays["facts"] = np.frombuffer(facts.encode(), "uint8")
        try:
            with unfinished.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            self._sync_folder()
        finally:
            unfinished.unlink(missing_ok=True)
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def mark_best(self, path):
        """Makes a written checkpoint the best one."""
        link = self.folder / f".{BEST}.{os.getpid()}.tmp"
        link.unlink(missing_ok=True)
        os.link(path, link)
        link.replace(self.folder / f"{BEST}{SUFFIX}")
        self._sync_folder()

    def paths(self):
        """The checkpoints, from the oldest to the last."""
        return sorted(self.folder.glob(f"{PREFIX}*{SUFFIX}"))

    def read_last(self):
        """The last checkpoint that can be read: `(path, arrays, facts)`, or `None`."""
        for stale in self.folder.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
        for path in reversed(self.paths()):
            try:
                return path, *read(path)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                warnings.warn(
                    f"The checkpoint {path} cannot be read ({error}); trying the one "
                    "before.",
                    stacklevel=2,
                )
        return None

    def _sync_folder(self):
        # Else the new name may be lost with the power, though the file is not.
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path):
    """The arrays and the facts of a checkpoint."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    facts = json.loads(arrays.pop("facts").tobytes())
    for key in facts.pop("bfloat16"):
        arrays[key] = arrays[key].view(ml_dtypes.bfloat16)
    return arrays, facts
