"""Subtests: parts of a test with results of their own, as the kernel's selftests have (KTAP shows them nested).

A failing part ends there; the test goes on after its `with` block and fails at its end. What is neither an assertion nor an error of KVM's
or of a system call, a bug of the test, ends the whole test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvmapi.errors import KvmApiError
from vmm.selftests.case import Skip

PASS, FAIL, SKIP = "pass", "fail", "skip"


@dataclass(frozen=True)
class Part:
    """One finished subtest: `result` is pass, fail or skip; `text` why."""

    name: str
    result: str
    text: str = ""


class Subtest:
    """The fixture `subtest`: `with subtest("name"): ...`. `parts`: what has finished."""

    def __init__(self, explain: Callable[[BaseException], str] = str) -> None:
        self.parts: list[Part] = []
        self.explain = explain

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One part called `name`."""
        try:
            yield
        except Skip as reason:
            self.parts.append(Part(name, SKIP, str(reason)))
        except (AssertionError, OSError, KvmApiError) as failure:
            self.parts.append(Part(name, FAIL, self.explain(failure)))
        else:
            self.parts.append(Part(name, PASS))

    @property
    def failed(self) -> list[Part]:
        """The parts that failed."""
        return [part for part in self.parts if part.result == FAIL]

    @property
    def all_skipped(self) -> bool:
        """There were parts, and each was skipped."""
        return bool(self.parts) and all(part.result == SKIP for part in self.parts)
