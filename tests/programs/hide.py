"""Runs a program of the repository as if some packages were not installed.

    python hide.py PACKAGE,... PROGRAM [ARGUMENT ...]

The program fails if one of them is imported nevertheless.
"""

import importlib.util
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Without:
    """Finds all that another finder finds but some packages."""

    def __init__(self, finder, packages):
        self.finder = finder
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def main(packages, program, *arguments):
    packages = packages.split(",")
    sys.meta_path[:] = [Without(finder, packages) for finder in sys.meta_path]
    assert not any(map(importlib.util.find_spec, packages))
    # As for a program that runs by itself.
    path = ROOT / program
    sys.path[0] = str(path.parent)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")
    assert not {*packages} & {*sys.modules}


if __name__ == "__main__":
    main(*sys.argv[1:])
