"""The pages of the API have every public name, documented and with types."""

import inspect
import operator
import re
import typing

import pytest

import keras_cluster_mask as kcm
from tests.helpers import ROOT

pytestmark = pytest.mark.any_backend

DOCS, PACKAGE = ROOT / "docs", ROOT / "keras_cluster_mask"
# What mkdocstrings looks up, and the page that shows it.
ENTRIES = {
    path: page.name
    for page in sorted((DOCS / "api").glob("*.md"))
    for path in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
}
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
    return sorted(names)


def shown(path):
    """A module hides a function of its name: `data.check` is `data.check.check`."""
    *parts, name = path.removeprefix("keras_cluster_mask.").split(".")
    return ".".join(parts if parts[-1:] == [name] else [*parts, name])


def test_pages_and_their_index_have_every_public_name():
    assert sorted(map(shown, ENTRIES)) == public_names()
    index = (DOCS / "api.md").read_text(encoding="utf-8")
    links = re.findall(r"^- \[`kcm\.(\S+)`\]\(api/(\S+)#(\S+)\)", index, re.MULTILINE)
    assert sorted(links) == sorted(
        (shown(path), page, path) for path, page in ENTRIES.items()
    )


def public_functions(found):
    """A function itself; of a class or a module, the functions that users call."""
    if inspect.isfunction(found):
        return [found]
    home = getattr(found, "__file__", str(PACKAGE))
    functions = [
        *inspect.getmembers(found, inspect.isfunction),
        *inspect.getmembers(found, inspect.ismethod),
    ]
    return [
        function
        for name, function in functions
        if name[0] != "_" or name in ("__init__", "__call__", "__len__")
        if inspect.getfile(function).startswith(home)
    ]


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_has_a_docstring_and_types_that_can_be_read(name):
    found = operator.attrgetter(name)(kcm)
    assert found.__doc__
    bases = getattr(found, "__mro__", ())
    others = [each for each in bases if not each.__module__.startswith(kcm.__name__)]
    for function in public_functions(found):
        # A method that replaces one of Keras does what that one says.
        is_keras = any(hasattr(base, function.__name__) for base in others)
        assert is_keras or inspect.getdoc(function), function
        needed = {*inspect.signature(function).parameters, "return"} - {"self"}
        needed -= {"return"} if function.__name__ == "__init__" else set()
        assert needed <= typing.get_type_hints(function).keys(), function
