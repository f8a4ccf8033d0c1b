"""The page of the API holds every public name, and each has a documentation."""

import importlib
import importlib.util
import inspect
import pathlib
import re

import pytest

import keras_cluster_mask as kcm

pytestmark = pytest.mark.any_backend

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "api.md"
# Pairs of what mkdocstrings looks up, and what readers see.
ENTRIES = re.findall(
    r"^::: (\S+)\n +options:\n +heading: kcm\.(\S+)$", PAGE.read_text(), re.MULTILINE
)
# The module of losses has no `__all__`: other rooms use the rest of its functions.
LOSSES = {
    "losses.sigmoid_contrastive_loss",
    "losses.softmax_contrastive_loss",
}


def public_names():
    """All names; those that are at the root, too, without their module."""
    at_root = {name for name in kcm.__all__ if not inspect.ismodule(getattr(kcm, name))}
    names = at_root | LOSSES
    for module in set(kcm.__all__) - at_root - {"losses"}:
        of_module = set(getattr(kcm, module).__all__) - at_root
        names |= {f"{module}.{name}" for name in of_module}
    return names


def find(name):
    found = kcm
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_page_has_every_public_name_once():
    assert len(public_names()) > 70
    assert PAGE.read_text().count("\n::: ") == len(ENTRIES)
    assert sorted(shown for _, shown in ENTRIES) == sorted(public_names())


@pytest.mark.parametrize(("path", "shown"), ENTRIES)
def test_entry_shows_the_object_of_its_heading(path, shown):
    """A module hides a function of its name: `data.check` is `data.check.check`."""
    module, _, name = path.rpartition(".")
    assert path.removeprefix("keras_cluster_mask.").startswith(shown)
    assert getattr(importlib.import_module(module), name) is find(shown)
    is_module = importlib.util.find_spec(path) if is_package(module) else None
    assert inspect.ismodule(find(shown)) == (is_module is not None)


def is_package(name):
    return hasattr(importlib.import_module(name), "__path__")


@pytest.mark.parametrize("name", sorted(public_names()))
def test_public_name_and_its_own_methods_have_a_docstring(name):
    found = find(name)
    assert found.__doc__
    if inspect.isclass(found):
        for method, value in vars(found).items():
            value = getattr(value, "__func__", value)
            if inspect.isfunction(value) and not method.startswith("_"):
                # A method that replaces one of a base does what that one says.
                replaces = any(hasattr(base, method) for base in found.__mro__[1:])
                assert value.__doc__ or replaces, method
