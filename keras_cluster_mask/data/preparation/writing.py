"""Samples into a destination, part by part, so that a cut-off run goes on."""

import io
import itertools
import json

from PIL import Image

from keras_cluster_mask.data import files
from keras_cluster_mask.data.decoding import read_image
from keras_cluster_mask.data.pictures import Picture
from keras_cluster_mask.data.preparation.destinations import Encoded
from keras_cluster_mask.data.preparation.faults import FaultCount
from keras_cluster_mask.data.preparation.progress import Progress
from keras_cluster_mask.data.preparation.samples import Fault, decode, look_at
from keras_cluster_mask.data.preparation.survey import check_settings

JPEG_QUALITY = 95


def encoder(image_size=None, verify=True):
    """A function from a `Pair` to the `Encoded` picture that is written.

    Args:
        image_size: int. The shorter side of pictures that are larger; None: bytes are
            copied as they are.
        verify: bool. Whether to decode what is only copied, to see whether it is whole.
    """

    def encoded(pair):
        content = read_image(pair.image)
        picture = Picture(content)
        kind = picture.format
        if image_size and min(picture.size) > image_size:
            return _shrunk(picture, image_size)
        if verify:
            decode(content)
        return Encoded(content, kind)

    return encoded


def _shrunk(picture, image_size):
    scale = image_size / min(picture.size)
    size = tuple(max(round(side * scale), 1) for side in picture.size)
    array = picture.whole(size)
    file = io.BytesIO()
    # JPEG has no transparency.
    kind = "JPEG" if array.shape[2] == 3 else "PNG"
    Image.fromarray(array).save(file, kind, quality=JPEG_QUALITY)
    return Encoded(file.getvalue(), kind)


def write(
    name,
    samples,
    destination,
    look,
    options,
    *,
    kept=None,
    samples_per_shard=10_000,
    overwrite=False,
    num_threads=None,
    verbose=False,
):
    """Writes samples, and leaves out what is broken.

    Args:
        name: str. The command.
        samples: `Samples`.
        destination: `Destination`.
        look: function from a `Pair` to an `Encoded` picture.
        options: dict. Whatever else the output depends on.
        kept: set of int. The numbers, from 0, of the samples to write, with those that
            are broken counted too. Defaults to `None`: all.
        samples_per_shard: int.
        overwrite: bool. Whether to begin anew, whatever is there.
        num_threads: int.
        verbose: bool. Whether to show progress.

    Returns:
        dict: `"samples"`, how many were written; `"shards"`, where; `"broken"`,
        `"by_reason"` and `"first_broken"`, see `FaultCount`.

    Raises:
        ValueError: if something else is there already.
    """
    settings = {
        "command": name,
        **samples.settings,
        **options,
        "samples_per_shard": samples_per_shard,
    }
    state = _State(destination, settings, overwrite)
    if not state.finished:
        with Progress(name, len(samples), verbose) as progress:
            progress.resume(state.taken)
            good = state.good(samples, look, kept, num_threads, progress)
            limit = samples_per_shard if destination.several else None
            _write_parts(good, destination, state, limit)
        destination.finish(state.parts)
        state.save(finished=True)
    destination.tidy(state.parts)
    return {
        "samples": state.written,
        "shards": destination.outputs(state.parts),
        **state.faults.summary(),
    }


def _write_parts(good, destination, state, limit):
    keys = _Keys(destination, state.parts)
    first = next(good, None)
    while first is not None:
        with destination.open(state.parts) as part:
            rest = itertools.islice(good, limit and limit - 1)
            for pair, picture in itertools.chain([first], rest):
                part.write(keys.new(pair.key), picture, pair.captions)
                state.written += 1
        state.parts += 1
        state.save()
        first = next(good, None)


class _State:
    """How far a run is, kept in a file beside the output.

    Args:
        destination: `Destination`.
        settings: dict. What the output depends on.
        overwrite: bool. Whether to begin anew.
    """

    def __init__(self, destination, settings, overwrite):
        self._path = destination.state_path
        self._settings = settings
        self.parts = self.written = self.taken = 0
        self.position = 0, 0
        self.faults = FaultCount()
        self.finished = False
        if not overwrite and files.exists(self._path):
            self._load(destination)
            return
        _check_free(destination, settings, overwrite)
        self.save()

    def good(self, samples, look, kept, num_threads, progress):
        """Pairs and what `look` returned, from where the run is."""

        def wanted():
            items = samples.read(self.position)
            for number, (item, end) in enumerate(items, self.taken):
                if kept is None or number in kept or isinstance(item, Fault):
                    yield item, (number + 1, end)

        for item, result, after in look_at(wanted(), look, num_threads):
            self.taken, self.position = after
            progress(self.position[0])
            if isinstance(item, Fault):
                self.faults.add(item.shard, item.key, item.reason)
            else:
                yield item, result

    def save(self, finished=False):
        """Writes how far the run is."""
        self.finished = finished
        state = {
            "settings": self._settings,
            "finished": finished,
            "parts": self.parts,
            "written": self.written,
            "taken": self.taken,
            "position": self.position,
            **self.faults.summary(),
        }
        with files.replacing(self._path) as file:
            file.write(json.dumps(state, indent=1).encode())

    def _load(self, destination):
        try:
            with files.open_file(self._path) as file:
                state = json.loads(file.read())
            check_settings("to", self._path, state["settings"], self._settings)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"`to` has a damaged record of an earlier run. Received: {self._path}"
            ) from error
        self.finished = state["finished"]
        self.parts, self.written = state["parts"], state["written"]
        self.taken, self.position = state["taken"], tuple(state["position"])
        self.faults = FaultCount(state["by_reason"], state["first_broken"])
        expected = (
            destination.outputs(self.parts)
            if self.finished
            else [destination.path(number) for number in range(self.parts)]
        )
        for path in expected:
            if not files.exists(path):
                raise ValueError(
                    "`to` has lost a part that an earlier run has written; "
                    f"`overwrite` begins anew. Received: {path}"
                )


def _check_free(destination, settings, overwrite):
    sources = {path for path, *_ in settings["sources"]}
    path = destination.outputs(1)[0]
    if path in sources:
        raise ValueError(f"`to` must not be what is read. Received: {path}")
    if files.exists(path) and not overwrite:
        raise ValueError(
            "`to` must not be there already, unless an earlier run of the same command "
            f"left it; `overwrite` replaces it. Received: {path}"
        )


class _Keys:
    """Keys that a destination takes, each of them once.

    Args:
        destination: `Destination`.
        parts: int. How many parts are there already.
    """

    def __init__(self, destination, parts):
        self._destination = destination
        self._next = {}
        for number in range(parts):
            for key in destination.keys(number):
                self._next.setdefault(destination.same(key), 2)

    def new(self, key):
        """A key; with a number behind it if it comes again."""
        key = found = self._destination.key(key)
        same = self._destination.same
        # The number goes up for good: a key that comes often is not searched for anew.
        while same(found) in self._next:
            number = self._next[same(key)]
            self._next[same(key)] = number + 1
            found = f"{key}-{number}"
        self._next[same(found)] = 2
        return found
