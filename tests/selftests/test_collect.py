"""What is found, under which names, and what patterns mean."""

from __future__ import annotations

import pytest

from vmm.selftests import collect
from vmm.selftests.case import runs_on

SAMPLES, BROKEN = "tests.selftests.samples", "tests.selftests.broken"


def ids(*patterns: str, **more: str) -> list[str]:
    return [item.id for item in collect.select(patterns, package=SAMPLES, **more)[0]]


def test_suites_are_in_alphabetical_order_and_tests_in_the_order_of_the_text() -> None:
    assert collect.suites(SAMPLES) == ["bad", "good"]
    assert ids("good") == ["good.types[plain]", "good.types[sev]", "good.parts[plain]", "good.skipped[plain]"]


def test_an_item_knows_what_its_test_says_about_itself() -> None:
    first = collect.items("good", SAMPLES)[0]
    assert (first.text, first.timeout, first.dialect) == ("Runs once on each type.", None, "mainline")
    assert next(item for item in collect.items("bad", SAMPLES) if item.name == "hangs").timeout == 0.3


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("good.types[sev]", ["good.types[sev]"]),
        ("types[sev]", ["good.types[sev]"]),
        ("types", ["good.types[plain]", "good.types[sev]"]),
        ("test_types", ["good.types[plain]", "good.types[sev]"]),
        ("parts", ["bad.parts[plain]", "good.parts[plain]"]),
        ("good.*ed*", ["good.skipped[plain]"]),
        ("*[sev]", ["good.types[sev]"]),
        ("goo", []),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    assert ids(pattern) == expected


def test_type_and_dialect_leave_only_their_runs() -> None:
    assert ids(type="sev") == ["good.types[sev]"]
    assert ids("good", dialect="upm-v6") == []


def test_a_suite_that_cannot_be_imported_is_told_and_harms_no_other() -> None:
    items, broken = collect.select(package=BROKEN)
    assert items == [] and str(broken["cannot_import"]) == "on purpose"


def test_every_suite_of_the_package_can_be_imported_and_has_tests_with_a_story() -> None:
    items, broken = collect.select()
    assert broken == {}
    assert {item.suite for item in items} == set(collect.suites())
    assert [item.id for item in items if not item.text] == [], "tests without a docstring"
    assert len({item.id for item in items}) == len(items)


def test_runs_on_refuses_a_type_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no VM type snp"):
        runs_on("sev", "snp")
