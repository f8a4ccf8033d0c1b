"""What a user installs: its files, its metadata, and the types of its interface."""

import ast
import email
import functools
import importlib.metadata
import inspect
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import typing
import zipfile

import pytest

import keras_cluster_mask as kcm

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "keras_cluster_mask"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Modules with public names.
ROOMS = [kcm, kcm.interop.clip_benchmark]
ROOMS += [
    getattr(kcm, name) for name in kcm.__all__ if name.isalpha() and name.islower()
]

# === Types ===


def public_functions():
    """Names and functions: all that users call, and methods that they may override."""
    found = {}
    for room in ROOMS:
        names = getattr(room, "__all__", None)
        for name in names or [x for x in vars(room) if x[0] != "_"]:
            value = getattr(room, name)
            module = getattr(value, "__module__", "")
            # A module without a list has what it defines.
            if module.startswith(kcm.__name__) and (names or module == room.__name__):
                found.update(_functions(f"{room.__name__}.{name}", value))
    return found


def _functions(name, value):
    if inspect.isfunction(value):
        return {name: value}
    functions = {}
    for base in value.__mro__ if inspect.isclass(value) else ():
        if not base.__module__.startswith(kcm.__name__):
            continue
        for key, member in vars(base).items():
            if isinstance(member, property):
                member = member.fget
            # Functions in class methods and cached properties.
            for attribute in ("__func__", "func"):
                member = getattr(member, attribute, member)
            is_public = key[0] != "_" or key in ("__init__", "__call__", "__len__")
            # Dataclasses write their own.
            is_written = inspect.isfunction(member) and "<" not in member.__qualname__
            file = member.__code__.co_filename if is_written else ""
            if is_public and file.startswith(str(PACKAGE)):
                functions.setdefault(f"{name}.{key}", member)
    return functions


FUNCTIONS = public_functions()


def test_public_functions_are_found():
    names = {name.rpartition("keras_cluster_mask.")[2] for name in FUNCTIONS}
    assert {"ContrastiveModel.preprocessing", "interop.clip_benchmark.adapt"} <= names
    assert {"ClusterMasking.__init__", "data.CLIPTokenizer.__call__"} <= names
    assert len(FUNCTIONS) > 200


def test_all_parameters_and_results_have_types():
    missing = []
    for name, function in FUNCTIONS.items():
        signature = inspect.signature(function)
        missing += [
            f"{name}: {parameter.name}"
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty
            and parameter.name not in ("self", "cls")
        ]
        is_missing = signature.return_annotation is signature.empty
        if is_missing and not name.endswith("__init__"):
            missing.append(f"{name}: return")
    assert missing == []


def test_types_can_be_read():
    for function in FUNCTIONS.values():
        typing.get_type_hints(function)


# === Metadata ===


def test_the_version_is_that_of_all_files():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [kcm.__version__]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.*?)\]", changelog, re.MULTILINE)[1] == kcm.__version__


def test_authors_and_addresses_are_the_same_in_all_files():
    project = PROJECT["project"]
    files = ("CITATION.cff", "mkdocs.yml", "README.md")
    citation, site, readme = ((ROOT / name).read_text("utf-8") for name in files)
    authors = [author["name"] for author in project["authors"]]
    cited = citation.partition("\nauthors:")[2].partition("\nkeywords:")[0]
    assert cited.count("\n  - ") == len(authors)
    assert all(word in cited for author in authors for word in author.split())
    urls = project["urls"]
    if not urls:
        pytest.skip("`[project.urls]` of pyproject.toml is empty: nothing is published")
    assert urls.keys() == {"Source", "Documentation", "Issues", "Changelog"}
    assert f"\nrepository-code: {urls['Source']}\n" in citation
    assert f"\nrepo_url: {urls['Source']}\n" in site
    assert f"\nsite_url: {urls['Documentation']}\n" in site
    # PyPI shows the README without the files beside it.
    assert re.findall(r"\]\((?!https:)\S+\)", readme) == []


def test_release_notes_are_the_section_of_the_version():
    run = [ROOT / ".ci" / "run", "release_notes"]
    notes = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = rf"^## \[{kcm.__version__}\].*\n((?:(?!## ).*\n)+)"
    assert notes == re.search(section, changelog, re.MULTILINE)[1]


def requirements(entries):
    return {re.match(r"[\w-]+", each)[0].lower().replace("_", "-") for each in entries}


def test_everything_that_is_imported_is_required():
    extras = PROJECT["project"]["optional-dependencies"]
    required = requirements(PROJECT["project"]["dependencies"])
    # In functions alone, with an error that says what to install.
    optional = requirements(
        [entry for entries in extras.values() for entry in entries]
        # Comes with torch for GPUs, and is passed over where it is missing. And the
        # library of tokenizers that a user had when a model was saved.
        + ["triton", "transformers"]
    )
    distributions = importlib.metadata.packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {name for node in tree.body for name in imported(node)}
        if path.parent.name == "missing_in_keras":
            # Imported on torch alone.
            top.discard("torch")
        anywhere = {name for node in ast.walk(tree) for name in imported(node)}
        for name in anywhere - {"keras_cluster_mask"} - set(sys.stdlib_module_names):
            # A package that is not installed here has its module's name.
            of_name = distributions.get(name, [name.replace("_", "-")])
            # Or it is another distribution of the module, such as keras-nightly.
            known = requirements(of_name) | {name.replace("_", "-")}
            assert known & (required if name in top else required | optional), (
                f"{path.name} imports {name}"
            )


def imported(node):
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module.partition(".")[0]}
    return set()


def test_tensorflow_is_not_required():
    assert not [x for x in PROJECT["project"]["dependencies"] if "tensorflow" in x]


# === Distributions ===


@functools.cache
def tracked_files():
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = done.stdout.decode().split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The paths of the source distribution, and of the wheel that is made of it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked_files():
        if not name.startswith("benchmarks/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    # Without the wheel's own environment, which would be downloaded.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source],
        check=True,
        capture_output=True,
    )
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def package_files():
    """The code and the images. Licenses are in the metadata, and READMEs in a clone."""
    files = ("*.py", "py.typed", "datasets/images/*.tar", "datasets/photographs/*.jpg")
    found = {path for pattern in files for path in PACKAGE.rglob(pattern)}
    return {path.relative_to(ROOT).as_posix() for path in found} & {*tracked_files()}


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_images_and_licenses(distributions):
    info = f"keras_cluster_mask-{kcm.__version__}.dist-info/"
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        metadata = email.message_from_bytes(wheel.read(f"{info}METADATA"))
    own = {name.removeprefix(info) for name in names if name.startswith(info)}
    assert own == {
        *("METADATA", "RECORD", "WHEEL", "top_level.txt"),
        *("licenses/LICENSE", "licenses/NOTICE"),
        *(f"licenses/{name}" for name in tracked_files() if "/LICENSES/" in name),
    }
    assert {name for name in names if not name.startswith(info)} == package_files()
    assert "keras_cluster_mask/py.typed" in names
    assert len([name for name in names if name.endswith((".tar", ".jpg"))]) == 12
    assert metadata["Version"] == kcm.__version__
    assert metadata["License-Expression"].startswith("Apache-2.0 AND OFL-1.1 AND ")
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra")) == set(extras)


@pytest.mark.slow
def test_the_source_distribution_holds_what_the_wheel_needs(distributions):
    sdist = distributions[0]
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in names if ".egg-info/" in name}
    made |= {"PKG-INFO", "setup.cfg"}
    # Setuptools adds these by itself.
    added = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test*.py")}
    assert names - made - added == {
        *package_files(),
        *("pyproject.toml", "README.md", "LICENSE", "NOTICE"),
        *(name for name in tracked_files() if "/LICENSES/" in name),
    }
    assert sdist.stat().st_size < 6_000_000


def test_after_a_release_the_installation_from_pypi_is_shown(tmp_path):
    before = "a\n<!-- after the first release\nb\n-->\nc\n<!-- d -->\n"
    for path in (".ci/run", "README.md", "docs/install.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(before)
        # Hidden, until a release has shown it.
        text = (ROOT / path).read_text(encoding="utf-8")
        assert path == ".ci/run" or 'pip install "keras_cluster_mask[jax]"' in text
    shutil.copy2(ROOT / ".ci/run", tmp_path / ".ci/run")
    for _ in range(2):
        subprocess.run([tmp_path / ".ci/run", "after_release"], check=True)
        for path in ("README.md", "docs/install.md"):
            assert (tmp_path / path).read_text() == "a\nb\nc\n<!-- d -->\n"
