"""Breaks one rule of the model while its module is imported: an import hook that compiles changed text.

No file is touched, and no compiled file is read or written for the changed module. The hook works in the process that installs it
and, through `start`, in the worker processes that `sevmm selftest` starts there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType

from mutatelib.rules import MUTATIONS, Mutation


class RuleGone(Exception):
    """The text that a mutation changes does not stand in its module (as often as it should); one sentence."""


def mutation(name: str) -> Mutation:
    """By name; KeyError."""
    return {one.name: one for one in MUTATIONS}[name]


def mutated(one: Mutation) -> tuple[str, str]:
    """(path, changed text) of the mutation's module. Raises RuleGone."""
    spec = importlib.machinery.PathFinder.find_spec(one.full_module, _package_path(one.full_module))
    if spec is None or spec.origin is None:
        raise RuleGone(f"{one.name}: there is no module {one.full_module}")
    with open(spec.origin, encoding="utf-8") as file:
        text = file.read()
    if text.count(one.old) != one.times:
        raise RuleGone(f"{one.name}: {one.full_module} has {one.old.strip()!r} {text.count(one.old)} times, expected {one.times}")
    return spec.origin, text.replace(one.old, one.new)


def check(one: Mutation) -> None:
    """Can the mutation be made, and is what it makes Python? Raises RuleGone or SyntaxError."""
    path, text = mutated(one)
    compile(text, path, "exec")


def install(name: str) -> None:
    """From now on the module of the mutation is a changed one in this process. Raises RuleGone, also when it was imported before."""
    one = mutation(name)
    if one.full_module in sys.modules:
        raise RuleGone(f"{one.name}: {one.full_module} was imported before the mutation")
    check(one)
    sys.meta_path.insert(0, _Finder(one))


def start(name: str, source: str) -> str:
    """Python source of a process, given as one line after imports of json and sys: with the mutation installed first.

    The line sets sys.path from its first argument before it imports anything else; the hook comes between the two.
    """
    first, rest = source.split("sys.path[:] = json.loads(sys.argv[1]); ", 1)
    return f"{first}sys.path[:] = json.loads(sys.argv[1]); from mutatelib.hook import install; install({name!r}); {rest}"


def _package_path(module: str) -> Sequence[str] | None:
    package = importlib.util.find_spec(module.rpartition(".")[0])
    return None if package is None else package.submodule_search_locations


class _Finder(MetaPathFinder):
    def __init__(self, one: Mutation) -> None:
        self._one = one

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The changed module's spec; None for every other."""
        if name != self._one.full_module:
            return None
        origin, _ = mutated(self._one)
        return importlib.util.spec_from_file_location(name, origin, loader=_Loader(name, origin, self._one))


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, one: Mutation) -> None:
        super().__init__(name, path)
        self._one = one

    def get_code(self, fullname: str) -> CodeType:
        """Compiled from the changed text, never from a cache."""
        path, text = mutated(self._one)
        return compile(text, path, "exec", dont_inherit=True)
