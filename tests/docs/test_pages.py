"""The code of the README and of the documentation runs, and links lead somewhere.

Blocks of Python run in order, in one scope for each page, on small data in the places
that pages name. Presets that pages download are folders here, which `conftest.py`
writes.
"""

import importlib.util
import re
import tomllib

import keras
import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from tests.helpers import ROOT

DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Words of blocks that run on one backend only.
BACKENDS = {"onnxruntime": "torch"}
# Lines that end in the shape of what they make or print.
SHAPE = re.compile(
    r"^(?:(?P<name>\w+) = .*|print\((?P<printed>.*)\))  # (?P<shape>\(\d[\d, ]*\))",
    re.MULTILINE,
)
FENCES = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
# Their pages are made by running the guides.
GUIDES = DOCS / "guides"
# What a page shows that continues the quickstart.
CONTINUES = '--8<-- "docs/quickstart.md:model"'
# How many photographs a page leaves for the test, of more than are here.
TEST = "test=1000"
PRESETS = re.compile(
    r'"(dinov2_small|all_minilm_l6_v2_en|clip_vit_base_patch16|siglip2_base_patch32_256)"'
)


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def all_pages():
    paths = [path for path in sorted(DOCS.rglob("*.md")) if path.parent != GUIDES]
    pages = [path.relative_to(ROOT).as_posix() for path in paths]
    return ["README.md", "CONTRIBUTING.md", "docs/guides/index.md", *pages]


def pages_with_code():
    for page in all_pages():
        text = read(page)
        if "```python" in text:
            depends = any(word in text for word in BACKENDS)
            marks = () if depends else pytest.mark.any_backend
            yield pytest.param(page, id=page, marks=marks)


@pytest.fixture
def defaults_after():
    yield
    keras.distribution.set_distribution(None)
    keras.config.set_dtype_policy("float32")


@pytest.mark.slow
@pytest.mark.usefixtures("in_folder", "defaults_after", "small_cifar100")
@pytest.mark.parametrize("page", pages_with_code())
def test_code_of_a_page_runs(page, request):
    text = read(page)
    scope = {"__name__": "__main__"}
    if CONTINUES in text:
        scope = request.getfixturevalue("quickstart")
    for block in CODE.finditer(text):
        code = block[1]
        if runs_here(code):
            code = PRESETS.sub(r'"./\1"', code).replace(TEST, "test=32")
            # Errors name the line of the page.
            lines = "\n" * text[: block.start(1)].count("\n") + code
            exec(compile(lines, f"<{page}>", "exec"), scope)
            check_shapes(code, scope)


def runs_here(code):
    if "load_hugging_face" in code and not importlib.util.find_spec("transformers"):
        return False
    backends = {backend for word, backend in BACKENDS.items() if word in code}
    return backends <= {keras.backend.backend()}


def check_shapes(code, scope):
    for line in SHAPE.finditer(code):
        shape = eval(line["printed"] or f"{line['name']}.shape", scope)
        assert tuple(shape) == eval(line["shape"]), line[0]


@pytest.mark.any_backend
def test_the_text_masking_of_a_page_keeps_nouns():
    codes = CODE.findall(read("docs/how_to/stages.md"))
    (code,) = (each for each in codes if "class SyntaxTextMasking" in each)
    exec(code, scope := {"kcm": kcm})
    masking = scope["SyntaxTextMasking"](
        lambda words: [(w, "NN" if w in ("dog", "snow") else "DT") for w in words]
    )
    captions = ["a photo of a brown dog that runs in the snow"]
    short = kcm.data.CLIPTokenizer.train(captions * 2, 600, context_length=4)
    assert short.decode(masking.tokenize(short, captions, [None])[0]) == "dog snow"


@pytest.mark.any_backend
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_the_adapter_of_a_page_embeds_as_the_model_does(resize):
    captions = ["a red flag", "a blue flag"]
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 600, context_length=8)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size, 8)
    model = kcm.ContrastiveModel.from_backbone(
        backbone, tokenizer=tokenizer, resize=resize
    )
    codes = CODE.findall(read("docs/how_to/evaluate.md"))
    (code,) = (each for each in codes if "class Adapter" in each)
    exec(code, scope := {"np": np, "model": model})
    adapter, texts = scope["adapter"], scope["Texts"](captions).to("cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), "uint8")
    photo = Image.fromarray(pixels)
    found = adapter.encode_image(adapter.transform(photo)[None])
    expected = model.encode_image([photo])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    expected = model.encode_text(captions)
    np.testing.assert_allclose(adapter.encode_text(texts), expected, atol=1e-6)


FOLDERS = [f"{folder}/README.md" for folder in ("benchmarks", "examples", "guides")]


@pytest.mark.any_backend
@pytest.mark.parametrize("page", [*all_pages(), *FOLDERS, "SECURITY.md"])
def test_links_files_and_extras_that_are_named_exist(page):
    text = read(page)
    for names in re.findall(r"pip install -e \"\.\[([\w,-]+)\]\"", text):
        assert set(names.split(",")) <= PROJECT["optional-dependencies"].keys()
    for program in re.findall(r"\b((?:guides|benchmarks|examples)/\w+\.py)\b", text):
        assert (ROOT / program).exists(), program
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCES.sub("", text)):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        if path.parent == GUIDES and (ROOT / "guides" / f"{path.stem}.py").exists():
            continue  # Made by running it.
        assert path.exists(), target
        # The API page shows the methods of classes below their names.
        if anchor:
            anchor = anchor.removesuffix(".fit").removesuffix(".compile")
            assert anchor in anchors_of(path), target


def anchors_of(path):
    """The anchors of headings, as GitHub and Python-Markdown make them."""
    text = FENCES.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    anchors = {re.sub(r"[\s-]+", "-", heading) for heading in plain}
    return anchors | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
