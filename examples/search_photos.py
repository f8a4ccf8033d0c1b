"""Searches a folder of photographs in the browser, by words or by a photograph.

    pip install "keras_cluster_mask[torch,app]"
    KERAS_BACKEND=torch python search_photos.py photos.keras photos/

The model is a `.keras` file of this library, or a preset of keras_hub for those who
train nothing: CLIP or SigLIP 2, by name or as a folder. The first start embeds all
photographs and keeps their embeddings; the next one embeds what is new or has changed.
The page is on this machine alone, asks no other for anything, and is closed to other
web sites.
"""

import argparse
import asyncio
import atexit
import collections
import contextlib
import hashlib
import html
import json
import os
import re
import signal
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path

# Read when Gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
_copies = tempfile.TemporaryDirectory(prefix="search_photos_")
os.environ["GRADIO_TEMP_DIR"] = _copies.name
atexit.register(_copies.cleanup)

import gradio as gr
import keras
import numpy as np
from PIL import Image, ImageOps
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse

import keras_cluster_mask as kcm

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

# Images that Pillow opens here: no videos, tables or PostScript.
TYPES = {x: Image.MIME.get(y, "") for x, y in Image.registered_extensions().items()}
SUFFIXES = {suffix for suffix, kind in TYPES.items() if kind.startswith("image/")}
CACHE = Path.home() / ".cache" / "keras_cluster_mask" / "search"
AT_A_TIME, THUMBNAIL, MAX_CHARACTERS = 32, 384, 1000
# Any port, because SSH may forward another one.
HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
MAX_BYTES, MAX_AGE = 20 * 2**20, 3600
# Without a second scroll bar, and with whole names where the mouse is.
CSS = """.grid-wrap { max-height: none !important; }
.gallery-item:hover .caption-label { opacity: 1; white-space: normal; }"""
# With this header, a browser asks no other host, whatever the page contains.
SOURCES = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
POLICY = b"content-security-policy", SOURCES


def main():
    parsed = argparse.ArgumentParser(
        description="Searches a folder of photographs in the browser.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parsed.add_argument
    add("model", help="a .keras file, or a preset of keras_hub")
    add("photos", type=Path, help="a folder, with all folders inside")
    add("--cache", type=Path, default=CACHE, help="folder of embeddings")
    add("--port", type=int, default=7860, help="of the page")
    options = parsed.parse_args()
    index = Index(load_model(options.model), options.photos, options.cache)
    index.update()
    for line in index.left_out():
        print(line)
    if len(index.broken) == len(index.embeddings):
        raise SystemExit(f"There is no photograph in {options.photos}.")
    # The copies of photographs are deleted in this case, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    threading.Thread(target=delete_old_copies, daemon=True).start()
    print(f"The page is http://127.0.0.1:{options.port}")
    page(index).launch(
        server_name="127.0.0.1",
        server_port=options.port,
        share=False,
        ssr_mode=False,
        quiet=True,
        app_kwargs={"middleware": [Middleware(Guard)]},
        css=CSS,
        # Gradio's own fonts come from the web.
        theme=gr.themes.Base(font=["sans-serif"], font_mono=["monospace"]),
        footer_links=[],
    )


def load_model(name):
    """Loads a `.keras` file, or a preset of keras_hub."""
    try:
        if name.endswith(".keras"):
            model = keras.saving.load_model(name)
        else:
            model = kcm.ContrastiveModel.from_preset(name)
    except (TypeError, ValueError) as error:
        if not (found := re.search(r"Could not locate class '(\w+)'", str(error))):
            raise
        raise SystemExit(
            f"{name} has the class {found[1]}. Import it in this program. If it is a "
            "masking, search does not need it: save `model.without_masking()`."
        ) from None
    if getattr(model, "tokenizer", None) is None:
        raise SystemExit(
            f"{name} has no tokenizer. Set `model.tokenizer`, and save it."
        )
    return model


class Guard:
    """Refuses requests of other web sites, and large ones.

    The name of a site may point at 127.0.0.1. A browser then sends this name as `Host`.
    For requests from a page of another site, it sends that site as `Origin`.
    """

    def __init__(self, app):
        self.app, self.uploading = app, asyncio.Lock()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        host, *others = headers.getlist("host") or [""]
        origins = {*headers.getlist("origin")} - {f"http://{host}"}
        is_own = HOSTS.fullmatch(host) and not (others or origins)
        # The page opens no websocket.
        if scope["type"] != "http" or not is_own:
            refused = PlainTextResponse("Open the page as 127.0.0.1 or localhost.", 403)
            return await refused(scope, receive, send)
        is_upload = scope["path"].endswith("/upload")
        async with self.uploading if is_upload else contextlib.nullcontext():
            await self.pass_on(scope, receive, send)

    async def pass_on(self, scope, receive, send):
        """Calls the application with a request that is complete."""
        body = bytearray()
        with contextlib.suppress(ClientDisconnect):
            async for part in Request(scope, receive).stream():
                body += part
                if len(body) > MAX_BYTES:
                    refused = PlainTextResponse("A file may have at most 20 MiB.", 413)
                    return await refused(scope, receive, send)
            messages = iter([{"type": "http.request", "body": bytes(body)}])

            async def received():
                return next(messages, None) or await receive()

            async def sent(message):
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], POLICY]
                await send(message)

            await self.app(scope, received, sent)


def delete_old_copies():
    """Deletes thumbnails and uploads that are an hour old, for as long as it runs."""
    while True:
        for file in Path(_copies.name).rglob("*"):
            with contextlib.suppress(OSError):
                if file.is_file() and time.time() - file.stat().st_mtime > MAX_AGE:
                    file.unlink()
        time.sleep(MAX_AGE / 60)


class Index:
    """The embeddings of all photographs of a folder, which are kept in a file.

    Args:
        model: A `ContrastiveModel` with a tokenizer.
        folder: Path.
        cache: Path, the folder of the file.

    Attributes:
        embeddings: Dictionary from the name of a photograph to its embedding, or `None`
            if the file cannot be read as an image.
        other_kinds: Dictionary from the suffixes of all other files to their number.
    """

    def __init__(self, model, folder, cache=CACHE):
        if not folder.is_dir():
            raise SystemExit(f"There is no folder {folder}.")
        self.model, self.folder = model, folder.resolve()
        config = keras.saving.serialize_keras_object(model.get_config())
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        digest.update(os.fsencode(self.folder))
        for weight in model.weights:
            digest.update(keras.ops.convert_to_numpy(weight).tobytes())
        self.file = cache / f"{digest.hexdigest()[:16]}.npz"
        self.embeddings, self.other_kinds = {}, {}

    def update(self):
        """Embeds photographs that are new or have changed, with a progress bar."""
        files = [x for x in self.folder.rglob("*") if not os.path.isdir(x)]
        kinds = collections.Counter(x.suffix.lower() for x in files).most_common()
        self.other_kinds = {kind: n for kind, n in kinds if kind not in SUFFIXES}
        files = sorted(x for x in files if x.suffix.lower() in SUFFIXES)
        now = {str(x.relative_to(self.folder)): version_of(x) for x in files}
        self.embeddings = {name: None for name, version in now.items() if not version}
        for name, (version, row) in self._read().items():
            if version and now.get(name) == version:
                self.embeddings[name] = row
        new = [name for name in now if name not in self.embeddings]
        bar = keras.utils.Progbar(len(new), unit_name="photo")
        for start in range(0, len(new), AT_A_TIME):
            names = new[start : start + AT_A_TIME]
            self.embeddings.update(zip(names, self._embed(names), strict=True))
            bar.add(len(names))
        self._write(now)

    @property
    def broken(self):
        """The names of files that cannot be read as images."""
        return [name for name, row in self.embeddings.items() if row is None]

    def left_out(self, most=None):
        """Yields lines about files that are not searched, with so many names."""
        if self.broken:
            names = ", ".join(map(as_text, self.broken[:most]))
            yield f"Not readable as images: {len(self.broken)} ({names})"
        if self.other_kinds:
            kinds = [f"{n} {as_text(x)}" for x, n in self.other_kinds.items()]
            total = sum(self.other_kinds.values())
            yield f"Of other kinds: {total} ({', '.join(kinds[:most])})"
        if {".heic", ".heif"} & self.other_kinds.keys():
            yield "To search HEIC: pip install pillow-heif"

    def best(self, query, count):
        """Returns pairs of a similarity and a name, those most similar first."""
        found = [(x @ query, k) for k, x in self.embeddings.items() if x is not None]
        return sorted(found, reverse=True)[:count]

    def _embed(self, names):
        try:
            return self.model.encode_image([self.folder / name for name in names])
        except (OSError, ValueError):
            if len(names) == 1:
                return [None]
            return [row for name in names for row in self._embed([name])]

    def _read(self):
        """Returns the version and the embedding of each photograph that is known."""
        try:
            with np.load(self.file) as found:
                names, versions = found["names"].tolist(), found["versions"].tolist()
                rows = zip(versions, found["embeddings"], strict=True)
                return dict(zip(names, rows, strict=True))
        # NumPy raises many kinds of errors.
        except Exception as error:
            if not isinstance(error, FileNotFoundError):
                print(f"{self.file} is damaged. All photographs are embedded again.")
            return {}

    def _write(self, versions):
        rows = {name: x for name, x in self.embeddings.items() if x is not None}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_suffix(".draft.npz")
        np.savez(
            draft,
            names=np.array([*rows], str),
            versions=np.array([versions[name] for name in rows], str),
            embeddings=np.array([*rows.values()]),
        )
        draft.replace(self.file)


def version_of(path):
    """Returns a text that changes with a file, "" unless there is one to read."""
    with contextlib.suppress(OSError):
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            return f"{found.st_size} {found.st_mtime_ns}"
    return ""


def as_text(name):
    """Replaces control characters, and bytes that are not UTF-8."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", name)


def page(index):
    """Returns the page, a `gr.Blocks`."""

    def photos_of(found):
        """Returns small copies of photographs with captions, those that are left."""
        shown = []
        for name, caption in found:
            try:
                with Image.open(index.folder / name) as image:
                    image = ImageOps.exif_transpose(image).convert("RGBA")
            except Exception:
                # Gradio shows messages as HTML.
                gr.Warning(html.escape(f"{as_text(name)} cannot be read any more."))
                continue
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            shown.append((image, caption))
        return shown

    def nearest(query, count):
        found = index.best(query, int(count))
        return photos_of(
            [(name, f"{score:.3f}  {as_text(name)}") for score, name in found]
        )

    def by_words(words, count):
        return nearest(index.model.encode_text([checked(words)])[0], count)

    def by_photo(upload, count):
        try:
            (query,) = index.model.encode_image([upload["path"]])
        except (OSError, ValueError) as error:
            raise gr.Error("This file is not an image.") from error
        finally:
            Path(upload["path"]).unlink(missing_ok=True)
        return nearest(query, count)

    def by_classes(words, count):
        """Shows the photographs of each class that are most similar to its name."""
        names = [x.strip() for x in checked(words).split(",") if x.strip()]
        if len(names) < 2:
            raise gr.Error("Type at least two classes, with a comma between them.")
        queries = index.model.encode_text(names)
        found = {name: [] for name in names}
        for name, embedding in index.embeddings.items():
            if embedding is not None:
                scores = queries @ embedding
                best = int(scores.argmax())
                found[names[best]].append((scores[best], name))
        return photos_of(
            [
                (name, f"{kind}  {score:.3f}  {as_text(name)}")
                for kind, rows in found.items()
                for score, name in sorted(rows, reverse=True)[: int(count)]
            ]
        )

    num_photos = len(index.embeddings) - len(index.broken)
    with gr.Blocks(title="Search photographs") as made:
        gr.Markdown(f"# Search {num_photos:,} photographs")
        if left_out := "\n".join(index.left_out(most=10)):
            # A name may look like Markdown or HTML, which a text box shows as text.
            gr.Textbox(left_out, label="Files that are left out", interactive=False)
        count = gr.Slider(1, 60, 12, step=1, label="Photographs, best first")
        with gr.Tab("A sentence"):
            words = gr.Textbox(label="Sentence", placeholder="a dog in the snow")
        with gr.Tab("A photograph"):
            # A `gr.Image` would convert the file, and show no message for a broken one.
            photo = gr.File(label="Photograph", height=140)
        with gr.Tab("Classes"):
            classes = gr.Textbox(label="Classes", placeholder="dogs, boats, people")
        options = dict(
            columns=4, object_fit="contain", height="auto", interactive=False
        )
        gallery = gr.Gallery(show_label=False, **options)
        for box, search in ((words, by_words), (classes, by_classes)):
            box.submit(search, [box, count], gallery, api_visibility="private")
        # Of each upload that Gradio prepares for a function, an empty file stays.
        options = dict(preprocess=False, api_visibility="private")
        photo.upload(by_photo, [photo, count], gallery, **options)
    return made


def checked(words):
    """Raises an error of the page unless there is a text of a useful length."""
    if not words.strip():
        raise gr.Error("Type a text first.")
    if len(words) > MAX_CHARACTERS:
        raise gr.Error(f"Type at most {MAX_CHARACTERS} characters.")
    return words


if __name__ == "__main__":
    main()
