"""Tests that pass or are skipped, for tests of the runner."""

from collections.abc import Callable

from vmm.selftests.api import Case, Subtest, runs_on, skip


@runs_on("plain", "sev", rungs=("model",))
def test_types(case: Case, note: Callable[[str], None]) -> None:
    """Runs once on each type."""
    note(f"type {case.type}\nok 1 forged")
    assert case.rung == "model" and case.type in ("plain", "sev")


@runs_on("plain", rungs=("model",))
def test_parts(subtest: Subtest) -> None:
    with subtest("one"):
        pass
    with subtest("two # not a directive"):
        skip("nothing to see")


@runs_on("plain", rungs=("model",))
def test_skipped() -> None:
    skip("no moon; wait for one")
