"""Every ```python block in the documentation of the package runs as it stands."""

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
    "keras_cluster_mask.data.captions.read_captions",
    "keras_cluster_mask.data.check.check",
    "keras_cluster_mask.data.shards.list_shards",
    "keras_cluster_mask.interop.hugging_face.load_hugging_face",
}


def documented_objects():
    """Pairs of a dotted name and a docstring, of all that is defined in the package."""
    found = {}
    for info in pkgutil.walk_packages(kcm.__path__, kcm.__name__ + "."):
        module = importlib.import_module(info.name)
        found[info.name] = module.__doc__
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != info.name:
                continue
            if not inspect.isclass(value) and not inspect.isfunction(value):
                continue
            found[f"{info.name}.{name}"] = value.__doc__
            for method_name, method in vars(value).items():
                method = getattr(method, "__func__", method)
                if inspect.isfunction(method) and not method_name.startswith("_"):
                    found[f"{info.name}.{name}.{method_name}"] = method.__doc__
    return found


def examples():
    for name, docstring in documented_objects().items():
        text = inspect.cleandoc(docstring or "")
        blocks = re.findall(
            r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE
        )
        for index, (_, code) in enumerate(blocks):
            yield pytest.param(name, textwrap.dedent(code), id=f"{name}-{index}")


def test_there_are_examples_to_run():
    names = {parameter.values[0].rsplit(".", 1)[-1] for parameter in examples()}
    assert names >= {
        "AttentiveMasking",
        "BlockMasking",
        "CenteredMasking",
        "ClusterMasking",
        "ContrastiveModel",
        "EdgeMasking",
        "GridMasking",
        "KMeansMasking",
        "MomentumEncoder",
        "PatchMasking",
        "RandomMasking",
        "masking_statistics",
        "plot_masking_statistics",
        "sigmoid_contrastive_loss",
        "softmax_contrastive_loss",
        "with_masking",
    }


@pytest.mark.parametrize(("name", "code"), examples())
def test_example_runs(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module_name = name
    while module_name not in documented_objects() or not _is_module(module_name):
        module_name = module_name.rpartition(".")[0]
    # The package's public names, as an example of `kcm.data` uses its neighbors.
    package = importlib.import_module(module_name.rpartition(".")[0] or module_name)
    scope = {**vars(package), **vars(importlib.import_module(module_name))}
    scope.update(kcm=kcm, keras=keras, np=np, __name__="example")
    if "keras_hub" in code:
        scope["keras_hub"] = pytest.importorskip("keras_hub")
    if name in NEED_FILES:
        with pytest.raises(FileNotFoundError):
            exec(code, scope)
        return
    exec(code, scope)


def _is_module(name):
    try:
        return inspect.ismodule(importlib.import_module(name))
    except ModuleNotFoundError:
        return False
