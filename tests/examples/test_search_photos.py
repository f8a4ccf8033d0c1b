"""The search in photographs: its index, and its page in a browser."""

import asyncio
import contextlib
import http.client
import json
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

import keras
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


def files_in(folder):
    return sorted(x for x in folder.rglob("*") if x.is_file())


def names_of(folder):
    return [str(x.relative_to(folder)) for x in files_in(folder)]


def test_only_new_and_changed_photographs_are_embedded_again(
    model, photos, tmp_path, monkeypatch, capsys
):
    import search_photos

    read, encode_image = [], kcm.ContrastiveModel.encode_image

    def counted(self, paths):
        (photos / "deleted.jpg").unlink(missing_ok=True)
        found = encode_image(self, paths)
        read.extend(str(x.relative_to(photos)) for x in paths)
        return found

    monkeypatch.setattr(kcm.ContrastiveModel, "encode_image", counted)

    def index(model=model):
        read.clear()
        found = search_photos.Index(model, photos, tmp_path / "cache")
        found.update()
        return found

    for name in ("a.avif", "b.JFIF", "\udcff.png"):
        Image.new("RGB", (30, 50), "blue").save(photos / name)
    names = names_of(photos)
    for name in ("a.heic", "b.heic", "c.txt", "deleted.jpg", "text.jpg"):
        (photos / name).write_text("no image")
    (photos / "link.jpg").symlink_to("nowhere")
    os.mkfifo(photos / "pipe.jpg")
    first = index()
    assert sorted(read) == names
    broken = ["deleted.jpg", "link.jpg", "pipe.jpg", "text.jpg"]
    assert sorted(first.broken) == broken
    _, kinds, remedy = first.left_out()
    assert kinds == "Of other kinds: 3 (2 .heic, 1 .txt)"
    assert "pillow-heif" in remedy
    again = index()
    assert not read
    assert sorted(again.broken) == broken[1:]
    np.testing.assert_array_equal(
        again.embeddings[names[3]], first.embeddings[names[3]]
    )
    Image.new("RGB", (40, 40), "red").save(photos / names[3])
    (photos / names[4]).unlink()
    Image.new("RGB", (30, 50), "blue").save(photos / "text.jpg")
    changed = index()
    assert sorted(read) == sorted([names[3], "text.jpg"])
    assert names[4] not in changed.embeddings
    assert sorted(changed.broken) == broken[1:3]
    # Another model has a file of its own, and so has other preprocessing.
    config = {"backbone": model.backbone, "tokenizer": model.tokenizer}
    for options in ({}, {"resize": "squash"}, {"pixel_mean": [0.5] * 3}):
        index(kcm.ContrastiveModel.from_backbone(**config, name=model.name, **options))
        assert len(read) == (67 if options else 0)
    model.image_encoder.trainable_variables[0].assign_add([1.0])
    file = index().file
    assert len(read) == 67
    file.write_bytes(file.read_bytes()[:99])
    index()
    assert len(read) == 67
    assert f"{file} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["Stripes", "tokenizer"])
def test_a_model_that_cannot_search_is_refused_in_one_line(kind, model, tmp_path):
    import search_photos

    @keras.saving.register_keras_serializable("test")
    class Stripes(kcm.RandomMasking):
        pass

    masking = Stripes(0.5) if kind == "Stripes" else None
    kcm.ContrastiveModel.from_backbone(model.backbone, masking=masking).save(
        tmp_path / "a.keras"
    )
    del keras.saving.get_custom_objects()["test>Stripes"]
    with pytest.raises(SystemExit, match=kind) as error:
        search_photos.load_model(str(tmp_path / "a.keras"))
    assert "\n" not in str(error.value)


# Runs the program, whose uploads are old after a second.
PROGRAM = """import search_photos
search_photos.MAX_AGE = 1
search_photos.main()"""


@contextlib.contextmanager
def serving(model, photos, tmp_path, program=None):
    """Runs the program; yields the address of its page and the folder of copies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    copies = tmp_path / "temporary"
    copies.mkdir()
    arguments = [model, photos, f"--cache={tmp_path / 'cache'}", f"--port={port}"]
    examples = ROOT / "examples"
    start = ["-c", program] if program else [examples / "search_photos.py"]
    path = f"{ROOT}{os.pathsep}{examples}"
    program = subprocess.Popen(
        [sys.executable, *start, *arguments],
        env={**os.environ, "TMPDIR": str(copies), "PYTHONPATH": path},
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


@pytest.mark.parametrize("kind", ["file", "preset with names that are HTML"])
def test_the_page_ranks_as_the_embeddings_do(kind, model, photos, tmp_path, browser):
    from playwright.sync_api import expect

    path = tmp_path / ("model.keras" if kind == "file" else "preset")
    no_image = "text.jpg"
    if kind == "file":
        model.save(path)
    else:
        model.save_to_preset(path)
        for number, name in enumerate(names_of(photos)):
            (photos / name).rename(photos / NAMES[number % 3].format(number))
        no_image = "".join(NAMES).format("a", "b", "c")
    names = names_of(photos)
    (photos / no_image).write_text("no image")
    images = model.encode_image([photos / name for name in names])

    def best(query, count):
        return [names[i] for i in (images @ query).argsort()[::-1][:count]]

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

        page.get_by_text("Search 64 photographs").wait_for()
        expect(page.get_by_label("left out")).to_have_value(
            re.compile(rf"^Not .*: 1 \({as_text(no_image)}")
        )
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
        page.set_input_files(
            "input[type=file]", shutil.copy(photos / names[7], tmp_path)
        )
        query = images[7]
        shows(best(query, 12))
        # Thumbnails alone.
        assert {x.name for x in files_in(copies)} == {"image.webp"}
        page.get_by_label("Clear").first.click()
        page.set_input_files(
            "input[type=file]", shutil.copy(photos / no_image, tmp_path / NAMES[1])
        )
        page.get_by_text("not an image").first.wait_for()

        # A photograph that is gone is left out.
        (query,) = model.encode_text(["blue"])
        gone = best(query, 12)[0]
        (photos / gone).unlink()
        page.get_by_role("tab", name="A sentence").click()
        page.get_by_label("Sentence").fill("blue")
        page.keyboard.press("Enter")
        page.get_by_text(re.compile(f"{as_text(gone)} cannot be read")).first.wait_for()
        shows(best(query, 12)[1:])

        page.get_by_role("tab", name="Classes").click()
        page.get_by_label("Classes").fill(f"red, {NAMES[1]}")
        page.keyboard.press("Enter")
        kinds = re.compile(rf"^(red|{re.escape(NAMES[1])}) ")
        page.get_by_text(kinds).first.wait_for()

        hosts = {url.split("/")[2] for url in requested if url.startswith("http")}
        assert hosts == {address.removeprefix("http://")}
        for outside in ("/etc/passwd", photos.parent / "model.keras"):
            with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
                urllib.request.urlopen(f"{address}/gradio_api/file={outside}")
    assert not files_in(copies)


def status_of(address, path="/", body=None, **headers):
    """Returns the status of an answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    with contextlib.closing(connection):
        connection.request("POST" if body else "GET", path, body, headers)
        return connection.getresponse().status


def search_by(address, path):
    """Asks for photographs like a file, which is deleted, and waits for the answer."""
    with urllib.request.urlopen(f"{address}/config") as found:
        parts = json.load(found)["dependencies"]
    (number,) = (x["id"] for x in parts if x["targets"][0][1] == "upload")
    upload = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [upload, 12], "fn_index": number, "session_hash": "a"}
    queue, content = f"{address}/gradio_api/queue", {"Content-Type": "application/json"}
    urllib.request.urlopen(
        urllib.request.Request(f"{queue}/join", json.dumps(body).encode(), content)
    ).close()
    with urllib.request.urlopen(f"{queue}/data?session_hash=a", timeout=30) as found:
        return next(line for line in found if b"process_completed" in line)


PATHS = "/", "/config", "/gradio_api/upload", "/gradio_api/queue/join"
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
START = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
END = b"\r\n--x--\r\n"


def test_other_web_sites_and_large_uploads_are_refused(
    model, photos, tmp_path, browser
):
    model.save(tmp_path / "model.keras")
    with serving(tmp_path / "model.keras", photos, tmp_path, PROGRAM) as served:
        address, copies = served
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
            for path in PATHS:
                for body in (None, START + END):
                    assert status_of(address, path, body, **headers) == 403
        # The name of a site that points at this machine, as in DNS rebinding.
        page = browser.new_page()
        assert page.goto(f"http://evil.example:{port}").status == 403
        page.evaluate(
            """address => {
                const body = new FormData();
                body.append("files", new Blob(["no image"]), "a.jpg");
                return fetch(address, {method: "POST", mode: "no-cors", body});
            }""",
            f"{address}/gradio_api/upload",
        )
        # A request of known length, and one in chunks.
        megabyte, large = b"x" * 2**20, tmp_path / "large.jpg"
        for size, as_body in ((20, b"".join), (90, iter)):
            body = as_body([START, *[megabyte] * size, END])
            assert status_of(address, PATHS[2], body, **MULTIPART) == 413
        page.goto(address)
        page.get_by_role("tab", name="A photograph").click()
        large.write_bytes(megabyte * 21)
        page.set_input_files("input[type=file]", large)
        page.get_by_text("at most 20 MiB").first.wait_for()
        # Only an upload is read, and deleted.
        own = files_in(photos)[0]
        assert b'"success":false' in search_by(address, own)
        assert own.exists()
        assert not files_in(copies)

        # What nobody uses, and what ends early, is deleted after a while.
        for body in (START + megabyte * 19 + END, START + b"no end"):
            assert status_of(address, PATHS[2], body, **MULTIPART) == 200
        assert len(files_in(copies)) == 2
        for _ in range(100):
            time.sleep(0.1 if files_in(copies) else 0)
        assert not files_in(copies)


def test_the_guard_lets_one_upload_through_at_a_time():
    import search_photos

    async def app(*_):
        events.append("start")
        await asyncio.sleep(0)
        events.append("end")

    async def receive():
        return {"type": "http.request"}

    async def run():
        guard = search_photos.Guard(app)
        scope = {"type": "http", "path": "/gradio_api/upload"}
        scope["headers"] = [(b"host", b"localhost")]
        await asyncio.gather(*[guard(scope, receive, None) for _ in "12"])

    events = []
    asyncio.run(run())
    assert events == ["start", "end"] * 2
