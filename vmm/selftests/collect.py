"""Finding tests: the modules of `vmm.selftests.suites`, their `test_*` functions, and the cases each runs on.

An item is one run of one test: `suite.test[case]`, as in `example.shared_word[sev]` (the `test_` is left out). Patterns are shell patterns
and match a suite, a suite and test, the test alone, or the whole id.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

from vmm.selftests.case import RunsOn, case_id, combinations, declared

PACKAGE = "vmm.selftests.suites"
PREFIX = "test_"


@dataclass(frozen=True)
class Item:
    """One run of one test. `name` is without `test_`; `text` is the docstring's first line."""

    suite: str
    name: str
    type: str
    dialect: str
    text: str = ""
    timeout: float | None = None

    @property
    def case(self) -> str:
        """The name of the case: the type, with the dialect outside mainline."""
        return case_id(self.type, self.dialect)

    @property
    def id(self) -> str:
        """`suite.test[case]`."""
        return f"{self.suite}.{self.name}[{self.case}]"


def suites(package: str = PACKAGE) -> list[str]:
    """The names of all suites, in alphabetical order."""
    return sorted(info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__))


def load(suite: str, package: str = PACKAGE) -> ModuleType:
    """The module of a suite; raises what its import raises."""
    return importlib.import_module(f"{package}.{suite}")


def tests(module: ModuleType) -> Iterator[tuple[str, Callable[..., object]]]:
    """The test functions of a module, by name without `test_`, in the order of its text; imported ones are not its own."""
    for name, value in vars(module).items():
        if name.startswith(PREFIX) and inspect.isfunction(value) and value.__module__ == module.__name__:
            yield name.removeprefix(PREFIX), value


def items(suite: str, package: str = PACKAGE) -> list[Item]:
    """All items of a suite."""
    return [item for name, function in tests(load(suite, package)) for item in _items(suite, name, function)]


def _items(suite: str, name: str, function: Callable[..., object]) -> Iterator[Item]:
    what: RunsOn = declared(function)
    text = (inspect.getdoc(function) or "").split("\n")[0]
    for type, dialect in combinations(what):
        yield Item(suite, name, type, dialect, text, what.timeout)


def matches(item: Item, patterns: Sequence[str]) -> bool:
    """Whether any of the patterns means this item; no patterns mean all."""
    names = (item.suite, item.name, f"{item.suite}.{item.name}", item.id, f"{item.name}[{item.case}]")
    return not patterns or any(_match(name, pattern) for pattern in patterns for name in names)


def _match(name: str, pattern: str) -> bool:
    """As `fnmatch`, but brackets are brackets: ids have them."""
    escaped = pattern.replace("[", "[[]")
    return fnmatch.fnmatchcase(name, escaped) or fnmatch.fnmatchcase(f"{PREFIX}{name}", escaped)


def select(
    patterns: Sequence[str] = (), type: str | None = None, dialect: str | None = None, package: str = PACKAGE
) -> tuple[list[Item], dict[str, BaseException]]:
    """The items that patterns, VM type and dialect leave, suite by suite; and the suites that could not be imported, with the reason."""
    found: list[Item] = []
    broken: dict[str, BaseException] = {}
    for suite in suites(package):
        try:
            mine = items(suite, package)
        except Exception as failure:  # whatever a module raises: the other suites run
            broken[suite] = failure
            continue
        found += [
            item for item in mine if matches(item, patterns) and type in (None, item.type) and dialect in (None, item.dialect)
        ]  # fmt: skip
    return found, broken
