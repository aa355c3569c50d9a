"""The RFC suite's own tools: the shared half of the test memory, and the text of its guest."""

from __future__ import annotations

import ctypes
import inspect
import signal
from pathlib import Path

import pytest

from vmm.selftests.case import RunsOn, find_case
from vmm.selftests.checks import signal_of
from vmm.selftests.privmem.beyond import BEYOND
from vmm.selftests.privmem.cases import SCENARIOS
from vmm.selftests.privmem.guest import PAT3, TEST_GPA
from vmm.selftests.privmem.runs import guest_text, make_rig
from vmm.selftests.privmem.shared import PAGE_2M, PAGE_4K, SharedMemory


@pytest.mark.parametrize(("size", "page"), [(2 * PAGE_4K, PAGE_4K), (PAGE_2M, PAGE_2M)])
def test_what_is_filled_is_read(size: int, page: int) -> None:
    memory = SharedMemory(size, page)
    try:
        assert memory.address % page == 0
        memory.fill(0x1122334455667788)
        memory.expect(0x1122334455667788)
        assert memory.read()[:8] == bytes.fromhex("8877665544332211") and len(memory.read()) == size
        with pytest.raises(AssertionError, match="differ, the first at 0x0"):
            memory.expect(0)
    finally:
        memory.close()
        memory.close()


def test_forbidden_memory_kills_who_touches_it_and_comes_back_empty() -> None:
    memory = SharedMemory(2 * PAGE_4K)
    try:
        memory.fill(0x5A5A5A5A5A5A5A5A)
        memory.forbid()
        assert signal_of(lambda: ctypes.string_at(memory.address, 1)) == signal.SIGSEGV
        assert signal_of(lambda: ctypes.memset(memory.address + PAGE_4K, 1, 1)) == signal.SIGSEGV
        with pytest.raises(AssertionError, match="about to touch"):
            memory.read()
        with pytest.raises(AssertionError, match="about to touch"):
            memory.fill(1)
        memory.allow()
        memory.expect(0)
    finally:
        memory.close()


@pytest.mark.parametrize("by_hlt", [True, False])
def test_the_guests_complaints_name_lines_of_the_cases(by_hlt: bool) -> None:
    text = guest_text(by_hlt).splitlines()
    for scenario in (*SCENARIOS, *BEYOND):
        source = Path(inspect.getfile(scenario.host))
        at = text.index(f"static void case_{scenario.number}(void)")
        directive, line, file = text[at + 2].split()
        assert (directive, file) == ("#line", f'"{source.name}"')
        lines = source.read_text().splitlines()
        first = next(i for i, words in enumerate(text[at + 3 :]) if words.strip())
        assert lines[int(line) - 1 + first] == text[at + 3 + first]
    assert ("#define UCALL_HLT" in text) == by_hlt


def test_a_failed_assertion_of_the_guest_is_a_failure_that_says_where() -> None:
    case = find_case("plain", "upm-v6", RunsOn(("plain",), ("upm-v6",), ("model",)))
    with make_rig(SCENARIOS[2], case, case.new_host()) as rig:
        rig.sync(0)
        rig.make_all_shared()
        rig.shared.fill(PAT3)  # not what the guest expects
        with pytest.raises(AssertionError, match=r"cases\.py:\d+: other_than.*0x3333333333333333, expected 0x6666666666666666"):
            rig.sync(1)


def test_each_case_has_its_number_and_a_name_of_its_own() -> None:
    scenarios = (*SCENARIOS, *BEYOND)
    assert [scenario.number for scenario in scenarios] == list(range(len(scenarios))) and len(SCENARIOS) == 8
    assert len({scenario.name for scenario in scenarios}) == len(scenarios)
    assert [scenario.guarded for scenario in SCENARIOS] == [False] * 7 + [True]


@pytest.mark.parametrize(("gpa", "size"), [(TEST_GPA - PAGE_4K, PAGE_4K), (TEST_GPA + PAGE_4K, 2 * PAGE_4K), (0x800000, PAGE_4K)])
def test_a_conversion_outside_the_test_memory_is_a_failure(gpa: int, size: int) -> None:
    case = find_case("plain", "upm-v7", RunsOn(("plain",), ("upm-v7",), ("model",)))
    with make_rig(SCENARIOS[0], case, case.new_host()) as rig, pytest.raises(AssertionError, match="a conversion of"):
        rig._convert("explicit", gpa, size, private=True)
