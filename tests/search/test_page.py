"""The page of the search, in a browser."""

import contextlib
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import keras
import keras_hub
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.search.__main__ import load
from tests.helpers import ROOT

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]


def names_of(folder):
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file())


@contextlib.contextmanager
def serving(model, photos, tmp_path):
    """Runs the command; yields the address of its page and the folder of thumbnails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    copies = tmp_path / "temporary"
    copies.mkdir()
    command = [sys.executable, "-m", "keras_cluster_mask.search", model, photos]
    program = subprocess.Popen(
        [*command, f"--cache={tmp_path / 'cache'}", f"--port={port}"],
        env={**os.environ, "TMPDIR": str(copies), "PYTHONPATH": str(ROOT)},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert program.poll() is None, "The program has ended."
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address).close()
                break
            time.sleep(0.5)
        yield address, copies
    finally:
        program.terminate()
        program.wait(60)


@pytest.fixture
def browser():
    """Chromium of the system, without requests of its own."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "These tests need Chromium: apt-get install chromium."
    rule = "--host-resolver-rules=MAP *.example 127.0.0.1"
    options = ["--no-sandbox", "--disable-background-networking", rule]
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=options)


# Markdown or HTML that asks another host, and a byte that is not UTF-8.
NAMES = [
    "{}\udcff![](http:&#47;&#47;one.example&#47;x).jpg",
    "{}<img src='http:&#47;&#47;two.example&#47;x'>.jpg",
    '{}<img src="http:\\\\three.example\\x">.jpg',
]


@pytest.mark.parametrize("kind", ["file", "exported", "preset with names of HTML"])
def test_the_page_ranks_as_the_embeddings_do(
    kind, model, photos, tmp_path, browser, request
):
    from playwright.sync_api import expect

    path = tmp_path / ("model.keras" if kind == "file" else "preset")
    no_image = "text.jpg"
    if kind == "file":
        model.save(path)
    elif kind == "exported":
        if keras.backend.backend() != "torch":
            pytest.skip("Keras writes ONNX for batches of any size with torch.")
        path = request.getfixturevalue("exported")
    else:
        model.save_to_preset(path)
        for number, name in enumerate(names_of(photos)):
            (photos / name).rename(photos / NAMES[number % 3].format(number))
        no_image = "".join(NAMES).format("a", "b", "c")
    names = names_of(photos)
    (photos / no_image).write_text("no image")
    images = model.encode_image([photos / name for name in names])

    def best(query):
        return [names[i] for i in (images @ query).argsort()[::-1][:12]]

    with serving(path, photos, tmp_path) as (address, copies):
        page, requested = browser.new_page(), []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(address)

        def as_text(name):
            return re.escape(name.replace("\udcff", "\ufffd"))

        def shows(names):
            """Waits until the page shows these photographs, in this order."""
            ends = [re.compile(f" {as_text(name)}\\s*$") for name in names]
            captions = page.locator(".caption-label")
            expect(captions).to_have_text(ends, timeout=30_000)

        def search(words):
            page.get_by_label("Sentence").fill(words)
            page.keyboard.press("Enter")

        page.get_by_text("Search 64 photographs").wait_for()
        expect(page.get_by_label("Skipped files")).to_have_value(
            f"Cannot be read as an image: {no_image}".replace("\udcff", "\ufffd")
        )
        for words in ("a red boat", "blue"):
            search(words)
            (query,) = model.encode_text([words])
            shows(best(query))
        for words in ("  ", "a" * 10_000):
            search(words)
            page.get_by_text("Enter a text of 1 to 1000").first.wait_for()
        page.locator(".thumbnail-item").nth(5).click()
        clicked = names.index(best(query)[5])
        shows(best(images[clicked]))

        # A photograph that is gone is left out.
        gone = best(query)[0]
        (photos / gone).unlink()
        search("blue")
        page.get_by_text(
            re.compile(f"{as_text(gone)} can no longer be read")
        ).first.wait_for()
        shows(best(query)[1:])

        hosts = {url.split("/")[2] for url in requested if url.startswith("http")}
        assert hosts == {address.removeprefix("http://")}
        for outside in ("/etc/passwd", photos.parent / "images.tar"):
            with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
                urllib.request.urlopen(f"{address}/gradio_api/file={outside}")
        assert [*copies.rglob("*.webp")]
    assert not names_of(copies)


def status_of(address, path="/", body=None, **headers):
    """Returns the status of an answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    with contextlib.closing(connection):
        connection.request("POST" if body else "GET", path, body, headers)
        return connection.getresponse().status


def test_other_web_sites_and_uploads_are_refused(model, photos, tmp_path, browser):
    model.save(tmp_path / "model.keras")
    with serving(tmp_path / "model.keras", photos, tmp_path) as (address, copies):
        host = address.removeprefix("http://")
        port = host.split(":")[1]
        # SSH may forward another port.
        for own in (host, f"localhost:{port}", "[::1]:8888", "127.0.0.1"):
            assert status_of(address, Host=own, Origin=f"http://{own}") == 200
        for headers in (
            {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
            {"Host": "127.0.0.1.evil.example"},
            {"Host": "localhost@evil.example"},
            {"Host": ""},
            {"Origin": "http://evil.example"},
            {"Origin": "http://127.0.0.1:1"},
            {"Origin": f"https://{host}"},
            {"Origin": "null"},
        ):
            for path in ("/", "/config", "/gradio_api/queue/join"):
                for body in (None, b"{}"):
                    assert status_of(address, path, body, **headers) == 403
        # The name of a site that points at this machine, as in DNS rebinding.
        assert browser.new_page().goto(f"http://evil.example:{port}").status == 403
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        assert status_of(address, "/gradio_api/upload", b"--x--", **kind) == 403
        assert not names_of(copies)


def test_the_version_of_a_preset_changes_with_its_weights(model, hub, tmp_path):
    def version():
        model.save_to_preset(tmp_path / "clip")
        keras_hub.upload_preset("hf://me/clip", str(tmp_path / "clip"))
        return load("hf://me/clip")[1]

    before = version()
    assert version() == before
    model.image_encoder.trainable_variables[0].assign_add([1.0])
    assert version() != before


def test_a_model_without_a_tokenizer_is_refused(model, tmp_path):
    kcm.ContrastiveModel.from_backbone(model.backbone).save(tmp_path / "a.keras")
    with pytest.raises(SystemExit, match="tokenizer"):
        load(str(tmp_path / "a.keras"))


def test_a_model_that_does_not_exist_is_named():
    with pytest.raises(SystemExit, match=r"no file typo\.keras"):
        load("typo.keras")


def test_a_port_in_use_is_named(model, photos, tmp_path):
    model.save(tmp_path / "model.keras")
    command = [sys.executable, "-m", "keras_cluster_mask.search"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = subprocess.run(
            [
                *command,
                tmp_path / "model.keras",
                photos,
                f"--cache={tmp_path / 'cache'}",
            ]
            + [f"--port={port}"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert found.returncode == 1
    assert (
        f"Port {port} is in use. Choose another one: --port {port + 1}" in found.stderr
    )
