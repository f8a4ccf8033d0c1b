"""What was found on each sample, kept in a file so that a cut-off run goes on."""

import dataclasses
import json
import os
import pathlib

from keras_cluster_mask.data.preparation.progress import Progress
from keras_cluster_mask.data.preparation.samples import Fault, look_at

# So many findings are a line of the file.
LINE = 1000


def survey(name, samples, look, options, resume, num_threads, verbose):
    """Looks at all samples, or remembers what was found on them.

    Args:
        name: str. The command.
        samples: `Samples`.
        look: function from a `Pair` to a dict that JSON can hold.
        options: dict. Whatever else the findings depend on.
        resume: str or path. Where the findings are kept; None: nowhere.
        num_threads: int.
        verbose: bool. Whether to show progress.

    Yields:
        dict: `"shard"` and `"key"`; and what `look` returned, or `"reason"` and
        `"details"` of a fault.

    Raises:
        ValueError: if `resume` holds findings on other sources, or with other options.
    """
    journal = Journal(resume, {"command": name, **samples.settings, **options})
    with Progress(name, len(samples), verbose) as progress:
        for findings in journal.lines():
            progress.resume(len(findings))
            yield from findings
        findings, end = [], None
        items = samples.read(journal.position)
        for item, result, end in look_at(items, look, num_threads):
            progress(end[0])
            if isinstance(item, Fault):
                finding = dataclasses.asdict(item)
            else:
                finding = {"shard": item.shard, "key": item.key, **result}
            findings.append(finding)
            yield finding
            if len(findings) == LINE:
                journal.add(findings, end)
                findings = []
        if findings:
            journal.add(findings, end)


class Journal:
    """A file to which findings are added, a line at a time.

    A line that was cut off is dropped, and what it held is looked at again.

    Args:
        path: str or path, or None for a journal that keeps nothing.
        settings: dict. What the findings depend on; another file is refused.
    """

    def __init__(self, path, settings):
        self._path = path and pathlib.Path(path)
        self.position = 0, 0
        if not path:
            return
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._append(settings)
            return
        check_settings("resume", path, _read_settings(self._path), settings)

    def lines(self):
        """Yields the lists of findings that are there, and moves `position` along."""
        if not self._path:
            return
        with self._path.open("rb+") as file:
            end = len(file.readline())
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(line)
                entry = json.loads(line)
                self.position = tuple(entry["position"])
                yield entry["findings"]

    def add(self, findings, position):
        """Keeps findings.

        Args:
            findings: list of dicts.
            position: pair of ints. Where the samples go on after them.
        """
        if self._path:
            self._append({"position": position, "findings": findings})

    def _append(self, entry):
        with self._path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")


def _read_settings(path):
    try:
        with path.open("rb") as file:
            settings = json.loads(file.readline())
        return settings if isinstance(settings, dict) else {}
    except ValueError:
        return {}


def check_settings(argument, path, stored, given):
    """Raises an error unless a run is to go on with what it was begun with.

    Args:
        argument: str. What to name in the error.
        path: The file that remembers.
        stored: dict. What the run was begun with.
        given: dict. What it is to go on with.
    """
    given = json.loads(json.dumps(given))
    others = sorted(
        name for name in {*stored, *given} if stored.get(name) != given.get(name)
    )
    if others:
        raise ValueError(
            f"`{argument}` must go on with what it was begun with, but "
            f"{', '.join(others)} differ. Name another file, or remove this one. "
            f"Received: {os.fspath(path)}"
        )
