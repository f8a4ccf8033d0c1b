"""What a user installs: its version, what it requires, and its files."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import keras_cluster_mask as kcm
from tests.helpers import ROOT

pytestmark = pytest.mark.any_backend

PACKAGE = ROOT / "keras_cluster_mask"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_that_of_all_files():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {kcm.__version__}\n" in citation
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changelog.partition("\n## [")[2].startswith(f"{kcm.__version__}]")


# Modules that are not named as what installs them.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def requirements(entries):
    return {re.match(r"[\w-]+", each)[0].lower().replace("-", "_") for each in entries}


def test_everything_that_is_imported_is_required():
    extras = PROJECT["project"]["optional-dependencies"].values()
    required = requirements(PROJECT["project"]["dependencies"])
    assert "tensorflow" not in required
    # In functions alone, with an error that says what to install. Triton comes with
    # torch for GPUs. A user had transformers when a model with its tokenizer was saved.
    # keras_hub has read a preset with huggingface_hub before.
    others = ["triton", "transformers", "huggingface_hub"]
    optional = requirements(sum(extras, others))
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # Imported on torch alone.
        on_torch = {"torch"} if path.name.startswith("torch_") else set()
        top = imported(tree.body) - on_torch
        assert top <= required, path
        assert imported(ast.walk(tree)) <= required | optional, path


def test_only_distribution_asks_which_backend_runs():
    asking = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [x.func for x in ast.walk(tree) if isinstance(x, ast.Call)]
        if any(ast.unparse(x).rpartition(".")[2] == "backend" for x in calls):
            asking.add(path.relative_to(PACKAGE).as_posix())
    assert {name.partition("/")[0] for name in asking} == {"distribution"}


def imported(nodes):
    """The distributions of the modules that statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    tops = {name.partition(".")[0] for name in names}
    tops -= {"keras_cluster_mask", *sys.stdlib_module_names}
    return requirements(DISTRIBUTIONS.get(name, name) for name in tops)


def tracked_files():
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = done.stdout.decode().split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture
def wheel(tmp_path):
    """The wheel, made from the source distribution."""
    source = tmp_path / "source"
    for name in tracked_files():
        if not name.startswith("benchmarks/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    # Without the wheel's own environment, which would be downloaded.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (path,) = tmp_path.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_images_and_licenses(wheel):
    info = f"keras_cluster_mask-{kcm.__version__}.dist-info/"
    files = tracked_files()
    kept = re.compile(r"keras_cluster_mask/.*(\.py|\.tar|\.jpg|py\.typed)$")
    package = {name for name in files if kept.match(name)}
    licenses = {"LICENSE", "NOTICE", *(n for n in files if "/LICENSES/" in n)}
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    assert names == {
        *package,
        *(f"{info}licenses/{name}" for name in licenses),
        *(f"{info}{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")),
    }
    assert "keras_cluster_mask/py.typed" in names


def test_completion_offers_public_names_alone():
    rooms = [getattr(kcm, name) for name in kcm.__all__]
    modules = [room for room in rooms if inspect.ismodule(room)]
    assert len(modules) == 9
    for module in modules:
        assert dir(module) == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
    assert dir(kcm) == sorted([*kcm.__all__, "__version__"])
