"""Searches a folder of photographs in the browser, by words or by a photograph.

    pip install "keras_cluster_mask[search]"
    python -m keras_cluster_mask.search photos.keras photos/

The model is a `.keras` file, a folder that `examples/export_transformers_js.py` wrote,
or a preset of keras_hub that needs no training: CLIP or SigLIP 2, by name, as a folder
or as an `hf://` address. The first start embeds all photographs and keeps their
embeddings. Later starts embed only new and changed photographs. The page is only
available on this machine, and rejects requests from other websites.
"""

import argparse
import atexit
import hashlib
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

from keras_cluster_mask.search.index import CACHE, Index, version_of

# Any port, because SSH may forward another one.
HOSTS = re.compile(rb"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
# With this header, a browser asks no other host, whatever the page contains.
SOURCES = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def main():
    parsed = argparse.ArgumentParser(
        prog="python -m keras_cluster_mask.search",
        description="Searches a folder of photographs in the browser.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parsed.add_argument
    add("model", help="a .keras file, an exported folder, or a preset of keras_hub")
    add("photos", type=Path, help="a folder, including its subfolders")
    add("--cache", type=Path, default=CACHE, help="folder for the embeddings")
    add("--port", type=int, default=7860, help="the port of the page")
    options = parsed.parse_args()
    if not options.photos.is_dir():
        raise SystemExit(f"{options.photos} is not a folder.")
    model, version = load(options.model)
    index = Index(model, version, options.photos, options.cache)
    index.update()
    for line in index.left_out:
        print(line)
    if not index.names:
        reason = "" if index.error is None else f" The last error: {index.error}"
        raise SystemExit(f"There are no photographs in {options.photos}.{reason}")
    launch(index, options.port)


def load(name):
    """Returns a model, and a text that changes with it."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    version = " ".join([f"{path.resolve()}", *map(version_of, files)])
    if (path / "onnx").is_dir():
        from keras_cluster_mask.search.exported import ExportedModel

        return ExportedModel(path), version
    import keras

    # With the classes that a file names.
    from keras_cluster_mask import ContrastiveModel
    from keras_cluster_mask.models.loading import as_contrastive_model

    if path.suffix == ".keras" and not path.is_file():
        raise SystemExit(f"There is no file {path}.")
    # A name stands for a preset of keras_hub.
    make = as_contrastive_model if path.exists() else ContrastiveModel.from_preset
    model = make(name)
    if model.tokenizer is None:
        raise SystemExit(
            f"{name} has no tokenizer. Set `model.tokenizer`, and save the model again."
        )
    if not path.exists():
        # What a name stands for may change, and is the same in each folder.
        weights = hashlib.sha256()
        for weight in model.weights:
            weights.update(keras.ops.convert_to_numpy(weight).tobytes())
        version = f"{name} {weights.hexdigest()}"
    return model, version


def launch(index, port):
    """Shows the page until the program is interrupted."""
    copies = tempfile.TemporaryDirectory(prefix="search_photos_")
    atexit.register(copies.cleanup)
    # The thumbnails are deleted in this case, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # Read when Gradio is imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": copies.name}
    try:
        import gradio as gr
    except ImportError:
        raise SystemExit(
            'The search page needs Gradio: pip install "keras_cluster_mask[search]"'
        ) from None
    from starlette.middleware import Middleware

    from keras_cluster_mask.search.page import CSS, page

    shown = page(index)
    try:
        shown.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            ssr_mode=False,
            quiet=True,
            app_kwargs={"middleware": [Middleware(Guard)]},
            css=CSS,
            # Gradio's own fonts come from the web.
            theme=gr.themes.Base(font=["sans-serif"], font_mono=["monospace"]),
            footer_links=[],
        )
    except OSError:
        raise SystemExit(
            f"Port {port} is in use. Choose another one: --port {port + 1}"
        ) from None
    print(f"The page is at http://127.0.0.1:{port}", flush=True)
    shown.block_thread()


class Guard:
    """Refuses requests of other web sites, and uploads, which the page has not.

    The name of a site may point at 127.0.0.1. A browser then sends this name as `Host`.
    For requests from a page of another site, it sends that site as `Origin`.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        headers = dict(scope.get("headers", ()))
        host = headers.get(b"host", b"")
        is_own = (
            HOSTS.fullmatch(host)
            and headers.get(b"origin", b"http://" + host) == b"http://" + host
        )
        is_upload = scope.get("path", "").endswith("/upload")
        if scope["type"] != "lifespan" and (not is_own or is_upload):
            from starlette.responses import PlainTextResponse

            refused = PlainTextResponse("Open the page at 127.0.0.1 or localhost.", 403)
            return await refused(scope, receive, send)

        async def sent(message):
            if message["type"] == "http.response.start":
                policy = b"content-security-policy", SOURCES
                message["headers"] = [*message["headers"], policy]
            await send(message)

        await self.app(scope, receive, sent)


if __name__ == "__main__":
    main()
