"""What an entry is, and the helpers that entries share.

An entry measures one number that has a target. It either returns `Measured` or raises `Skipped` with what is missing and how to get it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TREE = Path(__file__).parents[2]


class Skipped(Exception):
    """The entry cannot be measured on this machine; the text says what is missing and how to get it."""


@dataclass(frozen=True)
class Measured:
    """The value, whether the target is met (None: compare the value with it), and what else is worth keeping."""

    value: float
    ok: bool | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A registered measurement: `target`, in `unit`, is the largest value that is good enough, or with `at_least` the smallest."""

    name: str
    unit: str
    target: float
    story: str
    measure: Callable[[], Measured]
    at_least: bool = False

    @property
    def bound(self) -> str:
        """The sign between value and target."""
        return ">=" if self.at_least else "<="

    def good(self, value: float) -> bool:
        """Is the target met?"""
        return value >= self.target if self.at_least else value <= self.target

    def run(self) -> dict[str, Any]:
        """Measure, and give the entry's object in the JSON."""
        result: dict[str, Any] = {
            "name": self.name,
            "value": None,
            "unit": self.unit,
            "target": self.target,
            "ok": None,
            "detail": {},
            "skipped": None,
        }
        try:
            measured = self.measure()
        except Skipped as reason:
            return {**result, "skipped": str(reason)}
        except Exception as error:  # one broken entry must not cost the others
            return {**result, "ok": False, "detail": {"error": f"{type(error).__name__}: {error}"}}
        good = self.good(measured.value) if measured.ok is None else measured.ok
        return {**result, "value": round(measured.value, 4), "ok": good, "detail": measured.detail}


ENTRIES: dict[str, Entry] = {}


def entry(name: str, unit: str, target: float, *, at_least: bool = False) -> Callable[[Callable[[], Measured]], Callable[[], Measured]]:
    """Register a function as the entry `name`; the first paragraph of its docstring is its story in --list."""

    def register(measure: Callable[[], Measured]) -> Callable[[], Measured]:
        story = " ".join((measure.__doc__ or "").strip().split("\n\n")[0].split())
        ENTRIES[name] = Entry(name, unit, target, story, measure, at_least)
        return measure

    return register


def progress(text: str) -> None:
    """One line on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def interleaved(rounds: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Call each side once per round, in turn; one list of results per side."""
    results: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, values in zip(sides, results, strict=True):
            values.append(side())
    return results


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def need(kind: str) -> None:
    """Raise `Skipped` unless the doctor finds `kind` here."""
    from vmm.doctor import reason_missing

    reason = reason_missing(kind)
    if reason is not None:
        raise Skipped(f"needs {kind}: {reason}")
