"""The search in photographs: its index, and its page in a browser."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from tests.helpers import ROOT

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]


@pytest.fixture
def photos(shard, tmp_path):
    """A folder of 64 images, one of which is in a folder inside."""
    folder = tmp_path / "photos"
    with tarfile.open(shard) as found:
        for member in found.getmembers():
            if not member.name.endswith(("txt", "json")):
                found.extract(member, folder, filter="data")
    (folder / "inside").mkdir()
    first = min(folder.glob("*.*"))
    first.rename(folder / "inside" / first.name)
    return folder


@pytest.fixture
def model():
    tokenizer = kcm.data.CLIPTokenizer.train(["a red boat", "a blue car"] * 9, 600, 12)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size, 12)
    return kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)


def names_of(folder):
    files = sorted(folder.rglob("*.*"))
    return [str(x.relative_to(folder)) for x in files if x.is_file()]


def test_only_new_and_changed_photographs_are_embedded_again(
    model, photos, tmp_path, monkeypatch
):
    import search_photos

    read, encode_image = [], model.encode_image

    def counted(paths):
        found = encode_image(paths)
        read.extend(str(x.relative_to(photos)) for x in paths)
        return found

    monkeypatch.setattr(model, "encode_image", counted)

    def index():
        read.clear()
        found = search_photos.Index(model, photos, tmp_path / "cache")
        found.update()
        return found

    names = names_of(photos)
    (photos / "text.jpg").write_text("no image")
    first = index()
    assert sorted(read) == names
    assert first.broken == ["text.jpg"]
    again = index()
    assert not read
    assert again.broken == ["text.jpg"]
    np.testing.assert_array_equal(
        again.embeddings[names[3]], first.embeddings[names[3]]
    )
    Image.new("RGB", (40, 40), "red").save(photos / names[3])
    (photos / names[4]).unlink()
    Image.new("RGB", (30, 50), "blue").save(photos / "text.jpg")
    changed = index()
    assert sorted(read) == sorted([names[3], "text.jpg"])
    assert names[4] not in changed.embeddings
    assert not changed.broken
    # Another model has a file of its own.
    model.image_encoder.trainable_variables[0].assign_add([1.0])
    index()
    assert len(read) == 64


@contextlib.contextmanager
def serving(model, photos, tmp_path):
    """Runs the program; yields the address of its page and the folder of copies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    copies = tmp_path / "temporary"
    copies.mkdir()
    arguments = [model, photos, f"--cache={tmp_path / 'cache'}", f"--port={port}"]
    program = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "search_photos.py", *arguments],
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
    options = ["--no-sandbox", "--disable-background-networking"]
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=options)


@pytest.mark.parametrize("kind", ["file", "preset"])
def test_the_page_ranks_as_the_embeddings_do(kind, model, photos, tmp_path, browser):
    from playwright.sync_api import expect

    path = tmp_path / ("model.keras" if kind == "file" else "preset")
    model.save(path) if kind == "file" else model.save_to_preset(path)
    (photos / "text.jpg").write_text("no image")
    names = [name for name in names_of(photos) if name != "text.jpg"]
    images = model.encode_image([photos / name for name in names])

    def best(query, count):
        return [names[i] for i in (images @ query).argsort()[::-1][:count]]

    with serving(path, photos, tmp_path) as (address, copies):
        page, requested = browser.new_page(), []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(address)

        def shows(names):
            """Waits until the page shows these photographs, in this order."""
            ends = [re.compile(f" {re.escape(name)}\\s*$") for name in names]
            captions = page.locator(".caption-label")
            expect(captions).to_have_text(ends, timeout=30_000)

        page.get_by_text("Search 64 photographs").wait_for()
        page.get_by_text("text.jpg").wait_for()
        for words in ("a red boat", "blue"):
            (query,) = model.encode_text([words])
            page.get_by_label("Sentence").fill(words)
            page.keyboard.press("Enter")
            shows(best(query, 12))

        # What is no sentence is said to be none.
        for words, message in (("  ", "Type a text"), ("a" * 10_000, "at most 1000")):
            page.get_by_label("Sentence").fill(words)
            page.keyboard.press("Enter")
            page.get_by_text(message).first.wait_for()

        page.get_by_role("tab", name="A photograph").click()
        page.set_input_files("input[type=file]", photos / names[7])
        query = images[7]
        shows(best(query, 12))
        page.get_by_label("Clear").first.click()
        page.set_input_files("input[type=file]", photos / "text.jpg")
        page.get_by_text("not an image").first.wait_for()

        # A photograph that is gone is left out.
        (query,) = model.encode_text(["blue"])
        gone = best(query, 12)[0]
        (photos / gone).unlink()
        page.get_by_role("tab", name="A sentence").click()
        page.get_by_label("Sentence").fill("blue")
        page.keyboard.press("Enter")
        page.get_by_text(f"{gone} cannot be read").first.wait_for()
        shows(best(query, 12)[1:])

        page.get_by_role("tab", name="Classes").click()
        page.get_by_label("Classes").fill("red, blue")
        page.keyboard.press("Enter")
        page.get_by_text(re.compile(r"^(red|blue) ")).first.wait_for()

        hosts = {url.split("/")[2] for url in requested if url.startswith("http")}
        assert hosts == {address.removeprefix("http://")}
        assert any(copies.rglob("*.webp"))
        for outside in ("/etc/passwd", photos.parent / "model.keras"):
            with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
                urllib.request.urlopen(f"{address}/gradio_api/file={outside}")
    assert not [*copies.rglob("*.*")]
