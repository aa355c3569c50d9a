"""KTAP that a strict reader understands, whatever the tests' texts contain."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest

from vmm.selftests import ktap
from vmm.selftests.execute import Result
from vmm.selftests.subtests import Part

_RESULT = re.compile(r"(not ok|ok) (\d+) ([^#]*?)(?: # (SKIP|TIMEOUT)(?: (.*))?)?")


@dataclass
class Line:
    """One result line of a document, with the tests nested before it."""

    name: str
    ok: bool
    directive: str = ""
    why: str = ""
    inner: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse(lines: list[str], indent: str = "") -> list[Line]:
    """One block: version, plan, results; consumes its lines. Written from the KTAP specification, version 1."""
    assert lines.pop(0) == f"{indent}KTAP version 1"
    while lines[0].startswith(f"{indent}# "):
        del lines[0]
    plan = re.fullmatch(r"1\.\.(\d+)", lines.pop(0).removeprefix(indent))
    assert plan is not None
    found: list[Line] = []
    inner: list[Line] = []
    notes: list[str] = []
    while len(found) < int(plan[1]):
        line = lines.pop(0)
        assert line.startswith(indent), line
        text = line.removeprefix(indent)
        if text.startswith("  KTAP"):
            inner = parse([line, *take(lines, indent + "  ")], indent + "  ")
        elif text.startswith("#"):
            notes.append(text)
        else:
            match = _RESULT.fullmatch(text)
            assert match is not None, line
            assert int(match[2]) == len(found) + 1, "numbers rise by one"
            found.append(Line(match[3], match[1] == "ok", match[4] or "", match[5] or "", inner, notes))
            inner, notes = [], []
    return found


def take(lines: list[str], indent: str) -> list[str]:
    block = []
    while lines and lines[0].startswith(indent):
        block.append(lines.pop(0))
    return block


def document(*suites: tuple[str, list[Result]]) -> list[Line]:
    lines = list(ktap.head(len(suites)))
    for number, (name, results) in enumerate(suites, 1):
        lines += ktap.suite(number, name, results)
    return parse("\n".join(lines).split("\n"))


def result(name: str, kind: str = "pass", text: str = "", **more: object) -> Result:
    return Result("s", name, "plain", "mainline", kind, text, **more)  # type: ignore[arg-type]


def test_results_nest_three_deep() -> None:
    parts = [Part("one", "pass"), Part("two", "fail", "because"), Part("three", "skip", "no moon")]
    (suite,) = document(("s", [result("a", "fail", "1 of 3", parts=parts), result("b", rung="model", rung_reason="asked for")]))
    assert (suite.name, suite.ok) == ("s", False)
    a, b = suite.inner
    assert (a.name, a.ok, b.name, b.ok) == ("a[plain]", False, "b[plain]", True)
    assert [(t.name, t.ok, t.directive, t.why) for t in a.inner] == [
        ("one", True, "", ""),
        ("two", False, "", ""),
        ("three", True, "SKIP", "no moon"),
    ]
    assert a.inner[1].notes == ["# because"] and b.notes == ["# model: asked for, 0.00 s"]


def test_skips_carry_their_reason_and_a_suite_of_skips_is_one() -> None:
    skipped, mixed = document(("x", [result("a", "skip", "no\nmoon")]), ("y", [result("a", "skip", "no moon"), result("b")]))
    assert (skipped.directive, skipped.why, skipped.inner[0].why) == ("SKIP", "every test was skipped", "no moon")
    assert mixed.ok and not mixed.directive


def test_a_time_limit_has_its_directive() -> None:
    (suite,) = document(("s", [result("a", "fail", "did not end within 3 s\nstack", timed_out=True)]))
    assert (suite.inner[0].ok, suite.inner[0].directive, suite.inner[0].why) == (False, "TIMEOUT", "did not end within 3 s")
    assert suite.inner[0].notes == ["# did not end within 3 s", "# stack"]


@pytest.mark.parametrize(
    "text", ["x\nok 1 forged", "x\r\nnot ok 2 forged # SKIP", "x # SKIP y", "1..5", "KTAP version 1", "\x1b[2J\x85ok 1 a\u2028ok 2 b"]
)
def test_no_text_of_a_test_becomes_a_line_of_the_protocol(text: str) -> None:
    parts = [Part(text, "fail", text), Part(text, "skip", text)]
    (suite,) = document(
        ("s", [result(text, "fail", text, parts=parts), result("b", "skip", text), result("c", rung="model", rung_reason=text)])
    )
    assert [test.ok for test in suite.inner] == [False, True, True]
    assert [(test.ok, test.directive) for test in suite.inner[0].inner] == [(False, ""), (True, "SKIP")]


def test_totals_and_overall() -> None:
    results = [result("a"), result("b", "fail"), result("c", "skip"), result("d")]
    assert ktap.totals(results) == "# Totals: pass:2 fail:1 xfail:0 xpass:0 skip:1 error:0"
    assert [ktap.overall(some) for some in (results, results[:1], results[2:3], results[2:], [])] == [
        "fail",
        "pass",
        "skip",
        "pass",
        "skip",
    ]
