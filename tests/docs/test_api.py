"""The page of the API holds every public name, and each has a documentation."""

import importlib
import importlib.util
import inspect
import operator
import pathlib
import re

import pytest

import keras_cluster_mask as kcm

pytestmark = pytest.mark.any_backend

DOCS = pathlib.Path(__file__).parents[2] / "docs"
# What mkdocstrings looks up, on the page of its room.
ENTRIES = {
    path: page.name
    for page in sorted((DOCS / "api").glob("*.md"))
    for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
}
# The names of the first page and what they link to.
LINKS = re.findall(
    r"^- \[`kcm\.([\w.]+)`\]\(api/(\w+\.md)#(\S+)\): (.*)$",
    (DOCS / "api.md").read_text(),
    re.MULTILINE,
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
    return operator.attrgetter(name)(kcm)


def shown(path):
    """A module hides a function of its name: `data.check` is `data.check.check`."""
    *parts, name = path.removeprefix("keras_cluster_mask.").split(".")
    return ".".join(parts if parts[-1:] == [name] else [*parts, name])


def test_pages_have_every_public_name_once():
    assert len(public_names()) > 65
    texts = [page.read_text() for page in (DOCS / "api").glob("*.md")]
    assert sum(text.count("\n::: ") for text in texts) == len(ENTRIES)
    assert sorted(map(shown, ENTRIES)) == sorted(public_names())


def test_the_first_page_links_to_every_public_name():
    assert {path: page for _, page, path, _ in LINKS} == ENTRIES
    assert len(LINKS) == len(ENTRIES)
    assert all(name == shown(path) for name, _, path, _ in LINKS)


def test_the_first_page_says_of_each_name_what_its_docstring_begins_with():
    for name, _, path, line in LINKS:
        assert line == find(shown(path)).__doc__.strip().splitlines()[0], name


@pytest.mark.parametrize("path", ENTRIES)
def test_entry_shows_the_object_of_its_name(path):
    name, _, of_module = path.rpartition(".")
    module, found = importlib.import_module(name), find(shown(path))
    assert getattr(module, of_module) is found
    is_package = hasattr(module, "__path__")
    is_module = is_package and importlib.util.find_spec(path) is not None
    assert inspect.ismodule(found) == is_module


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
