"""Every ```python block in the documentation of the package runs as it stands."""

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm

pytestmark = pytest.mark.any_backend

# Their examples read files that a reader has and this test has not.
NEED_FILES = {
    "keras_cluster_mask.data.check.check",
    "keras_cluster_mask.interop.hugging_face.load_hugging_face",
}


def documented_objects():
    """Triples of a module, a dotted name and a docstring, of the whole package."""
    finder = doctest.DocTestFinder(exclude_empty=False)
    for info in pkgutil.walk_packages(kcm.__path__, kcm.__name__ + "."):
        module = importlib.import_module(info.name)
        for found in finder.find(module, info.name):
            yield module, found.name, found.docstring


def examples():
    for module, name, docstring in documented_objects():
        text = inspect.cleandoc(docstring or "")
        blocks = re.findall(
            r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE
        )
        for index, (_, code) in enumerate(blocks):
            code = textwrap.dedent(code)
            yield pytest.param(module, name, code, id=f"{name}-{index}")


def test_public_classes_have_examples_to_run():
    names = {parameter.values[1].rpartition(".")[2] for parameter in examples()}
    assert names >= {name for name in kcm.__all__ if name[0].isupper()} - {"Recipe"}


@pytest.mark.parametrize(("module", "name", "code"), examples())
def test_example_runs(module, name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The package's public names, as an example of `kcm.data` uses its neighbors.
    package = importlib.import_module(module.__name__.rpartition(".")[0])
    scope = {**vars(package), **vars(module)}
    scope.update(kcm=kcm, keras=keras, np=np, __name__="example")
    if "keras_hub" in code:
        scope["keras_hub"] = pytest.importorskip("keras_hub")
    if name in NEED_FILES:
        with pytest.raises(FileNotFoundError):
            exec(code, scope)
        return
    exec(code, scope)
