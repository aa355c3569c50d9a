"""The results of a run for programs (JSON, JUnit) and for people: a table rung x type x case, and what failed or was skipped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

from vmm.selftests.case import case_id
from vmm.selftests.execute import Result
from vmm.selftests.subtests import FAIL, PASS, SKIP

VERSION = 1
"""Of the JSON schema."""


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many passed, failed and were skipped."""
    found = Counter(result.result for result in results)
    return {PASS: found[PASS], FAIL: found[FAIL], SKIP: found[SKIP]}


def to_json(results: Sequence[Result], on: str, elapsed_s: float, interrupted: bool = False) -> dict[str, Any]:
    """The object of `sevmm selftest --json`: version, on, elapsed_s, interrupted (by Ctrl-C: tests are missing), totals {pass, fail,
    skip}, tests.

    A test has suite, test, type, dialect, rung ("" where it ran nowhere), rung_reason, result, text, elapsed_s, timed_out, notes (a list of
    strings), and subtests, a list of {name, result, text}.
    """
    return {
        "version": VERSION,
        "on": on,
        "elapsed_s": round(elapsed_s, 3),
        "interrupted": interrupted,
        "totals": counts(results),
        "tests": [result.to_json() for result in results],
    }


def to_junit(results: Sequence[Result], elapsed_s: float) -> bytes:
    """JUnit XML: one testsuite per suite, one testcase per test and case; subtests are in its system-out."""
    root = ElementTree.Element("testsuites", {"name": "sevmm selftest", **_numbers(counts(results), elapsed_s)})
    for suite in dict.fromkeys(result.suite for result in results):
        mine = [result for result in results if result.suite == suite]
        numbers = _numbers(counts(mine), sum(result.elapsed_s for result in mine))
        element = ElementTree.SubElement(root, "testsuite", {"name": suite, **numbers})
        for result in mine:
            _testcase(element, result)
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _numbers(total: dict[str, int], elapsed_s: float) -> dict[str, str]:
    return {
        "tests": str(sum(total.values())), "failures": str(total[FAIL]), "errors": "0", "skipped": str(total[SKIP]),
        "time": f"{elapsed_s:.3f}",
    }  # fmt: skip


def _testcase(suite: ElementTree.Element, result: Result) -> None:
    name = f"{result.test}[{case_id(result.type, result.dialect)}]"
    place = f"{result.rung}.{result.suite}" if result.rung else result.suite
    case = ElementTree.SubElement(suite, "testcase", name=name, classname=place, time=f"{result.elapsed_s:.3f}")
    if result.result == FAIL:
        failure = ElementTree.SubElement(case, "failure", message=_xml(result.text.split("\n")[0]))
        failure.text = _xml(result.text)
    elif result.result == SKIP:
        ElementTree.SubElement(case, "skipped", message=_xml(result.text))
    lines = [f"{part.result} {part.name}{': ' + part.text if part.text else ''}" for part in result.parts]
    lines += [f"note: {note}" for note in result.notes]
    if result.rung_reason:
        lines.insert(0, f"{result.rung}: {result.rung_reason}")
    if lines:
        ElementTree.SubElement(case, "system-out").text = _xml("\n".join(lines))


def _xml(text: str) -> str:
    """Text that XML 1.0 can hold: control characters and lone surrogates become \\xNN."""
    return "".join(c if _is_xml(c) else f"\\x{ord(c):02x}" for c in text)


def _is_xml(c: str) -> bool:
    return c in "\t\n" or 0x20 <= ord(c) < 0xD800 or 0xE000 <= ord(c) < 0xFFFE or ord(c) > 0xFFFF


Column = tuple[str, str]
"""Rung and case."""


def columns(results: Sequence[Result]) -> list[Column]:
    """The columns of the table: every (rung, case) that occurs; one without a rung only for a case that ran nowhere."""
    ran = {(result.rung, _case(result)) for result in results if result.rung}
    nowhere = {_case(result) for result in results} - {case for _, case in ran}
    order = list(dict.fromkeys(_case(result) for result in results))
    return sorted(ran | {("", case) for case in nowhere}, key=lambda column: (order.index(column[1]), column[0]))


def _case(result: Result) -> str:
    return case_id(result.type, result.dialect)


def rows(results: Sequence[Result]) -> Iterator[tuple[str, str, dict[Column, Result]]]:
    """The rows of the table: suite, test, and the results by column."""
    heads = columns(results)
    found: dict[tuple[str, str], dict[Column, Result]] = {}
    for result in results:
        place = (result.rung, _case(result))
        if place not in heads:  # skipped here, but other tests of this case ran
            place = next(column for column in heads if column[1] == _case(result))
        found.setdefault((result.suite, result.test), {})[place] = result
    for (suite, test), cells in found.items():
        yield suite, test, cells
