"""The code of the README and of the documentation runs, and links lead somewhere.

Blocks of Python run in order, in one scope for each page, on small data in the places
that pages name. Presets that pages download are folders here, which `conftest.py`
writes.
"""

import importlib.util
import pathlib
import re
import tomllib

import keras
import pytest

import keras_cluster_mask as kcm

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Words of blocks that run on one backend only.
BACKENDS = {"import tensorflow": "tensorflow", "onnxruntime": "torch"}
# Lines that end in the shape of what they make or print.
SHAPE = re.compile(
    r"^(?:(?P<name>\w+) = .*|print\((?P<printed>.*)\))  # (?P<shape>\(\d[\d, ]*\))",
    re.MULTILINE,
)
FENCES = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
# Their pages are made by running the guides.
GUIDES = DOCS / "guides"
# The tasks that a page shows from the first import; others continue the quickstart.
TASKS = {
    f"docs/how_to/{name}.md"
    for name in (
        *("connect_two_encoders", "fine_tune", "vision_transformer"),
        *("train_on_your_shards", "own_masking"),
    )
}
PRESETS = re.compile(r'"(dinov2_small|all_minilm_l6_v2_en|clip_vit_base_patch16)"')


# What is no prose: comments, code and the rows of tables.
TABLE_OR_CODE = re.compile(r"<!--.*?-->|^```.*?^```|^\|.*?$", re.DOTALL | re.MULTILINE)


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
# The small data is split by hashes.
@pytest.mark.filterwarnings("ignore:.* pairs fill no batch")
@pytest.mark.usefixtures("in_folder", "defaults_after", "small_cifar100")
@pytest.mark.parametrize("page", pages_with_code())
def test_code_of_a_page_runs(page, request):
    scope = {"__name__": "__main__"}
    if page.startswith("docs/how_to/") and page not in TASKS:
        scope = request.getfixturevalue("quickstart")
    text = read(page)
    for block in CODE.finditer(text):
        code = block[1]
        if runs_here(code):
            code = PRESETS.sub(r'"./\1"', code)
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
def test_how_to_pages_are_few_and_short_and_each_is_in_their_index():
    pages = {path.name for path in (DOCS / "how_to").glob("*.md")} - {"index.md"}
    assert 10 < len(pages) <= 18
    for page in pages:
        assert len(read(f"docs/how_to/{page}").splitlines()) <= 130, page
    index = read("docs/how_to/index.md")
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


@pytest.mark.any_backend
def test_how_to_pages_begin_with_the_code_that_they_continue():
    for path in (DOCS / "how_to").glob("*.md"):
        shows_it = '    --8<-- "docs/quickstart.md:model"\n' in path.read_text("utf-8")
        page = path.relative_to(ROOT).as_posix()
        assert shows_it == (page not in TASKS and path.stem != "index"), page


@pytest.mark.any_backend
def test_the_readme_and_the_pages_are_short():
    # Comments hold code and the sources of numbers, which readers do not see.
    seen = re.sub("<!--.*?-->", "", read("README.md"), flags=re.DOTALL)
    assert len(seen.split()) <= 750
    # The index of the API repeats docstrings.
    pages = [page for page in all_pages()[2:] if page != "docs/api.md"]
    prose = [TABLE_OR_CODE.sub("", read(page)) for page in pages]
    assert sum(len(page.split()) for page in prose) <= 11_000


@pytest.mark.any_backend
def test_the_readme_is_fit_for_pypi():
    lines = read("README.md").splitlines()
    assert max(map(len, lines)) < 100
    assert not [line for line in lines if line.startswith("|") and "<!--" in line]


@pytest.mark.any_backend
def test_one_promise_stands_everywhere():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    promise = project["description"]
    places = (read("README.md"), read("docs/index.md"), kcm.__doc__)
    assert all(promise in " ".join(text.split()) for text in places)


@pytest.mark.any_backend
def test_every_page_is_in_the_navigation():
    navigation = read("mkdocs.yml").partition("\nnav:\n")[2]
    named = set(re.findall(r"([\w/]+\.md)$", navigation, re.MULTILINE))
    assert {page.removeprefix("docs/") for page in all_pages()[2:]} <= named


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "page",
    [
        *all_pages(),
        "benchmarks/README.md",
        "examples/README.md",
        "guides/README.md",
        "SECURITY.md",
    ],
)
def test_links_and_files_that_are_named_exist(page):
    text = read(page)
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


@pytest.mark.any_backend
@pytest.mark.parametrize("page", all_pages())
def test_extras_that_pages_install_exist(page):
    project = tomllib.loads(read("pyproject.toml"))
    extras = project["project"]["optional-dependencies"]
    for names in re.findall(r"pip install -e \"\.\[([\w,-]+)\]\"", read(page)):
        assert set(names.split(",")) <= set(extras)
    groups = re.findall(r"pip install .*--group (\w+)", read(page))
    assert set(groups) <= set(project["dependency-groups"])
