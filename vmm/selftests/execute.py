"""Runs one item in this process and says how it went. Never raises for what a test does; Ctrl-C passes through."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from vmm.selftests.case import Case, Skip, declared, find_case
from vmm.selftests.collect import PACKAGE, Item, load, tests
from vmm.selftests.explain import explain
from vmm.selftests.fixtures import Fixtures
from vmm.selftests.subtests import FAIL, PASS, SKIP, Part


@dataclass
class Result:
    """How one item went. `result` is pass, fail or skip; `text` why; `rung` where it ran ("" if nowhere), with the reason for it;
    `timed_out`: it failed because its time was over; `notes`: what it wants to be read beside its result.
    """

    suite: str
    test: str
    type: str
    dialect: str
    result: str = FAIL
    text: str = ""
    rung: str = ""
    rung_reason: str = ""
    elapsed_s: float = 0.0
    timed_out: bool = False
    notes: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def of(cls, item: Item, result: str = FAIL, text: str = "") -> Result:
        """The result of `item`."""
        return cls(item.suite, item.name, item.type, item.dialect, result, text)

    def to_json(self) -> dict[str, Any]:
        """As data; the inverse of `from_json`."""
        data = asdict(self)
        data["subtests"] = data.pop("parts")
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """From data."""
        rest = {key: value for key, value in data.items() if key != "subtests"}
        return cls(**rest, parts=[Part(**part) for part in data["subtests"]])


def execute(item: Item, on: str = "auto", package: str = PACKAGE) -> Result:
    """Run `item` on the rung `on` and report."""
    result = Result.of(item)
    began = time.perf_counter()
    try:
        function = dict(tests(load(item.suite, package)))[item.name]
        case = find_case(item.type, item.dialect, declared(function), on)
        result.rung, result.rung_reason = case.rung, case.reason
        _run(function, case, result)
    except Skip as reason:
        result.result, result.text = SKIP, str(reason)
    except Exception as failure:  # whatever a test raises is its result
        result.result, result.text = FAIL, explain(failure)
    result.elapsed_s = time.perf_counter() - began
    return result


def _run(function: Callable[..., object], case: Case, result: Result) -> None:
    """Call the test with its fixtures; parts that failed make it fail, whatever else happened."""
    fixtures = Fixtures(case)
    fixtures.subtest.explain = explain
    result.parts, result.notes = fixtures.subtest.parts, fixtures.notes
    with fixtures:
        try:
            function(**{name: fixtures.get(name) for name in inspect.signature(function).parameters})
        except Skip as reason:
            if not result.parts:
                raise
            result.text = str(reason)
    failed = fixtures.subtest.failed
    if failed:
        result.result, result.text = FAIL, f"{len(failed)} of {len(result.parts)} subtests failed: {', '.join(p.name for p in failed[:5])}"
    elif fixtures.subtest.all_skipped:
        result.result, result.text = SKIP, result.text or result.parts[0].text
    else:
        result.result = PASS
