"""One item in this process: results, texts, subtests."""

from __future__ import annotations

import pytest

from vmm.selftests import collect
from vmm.selftests.execute import Result, execute

SAMPLES = "tests.selftests.samples"

pytestmark = [pytest.mark.model, pytest.mark.gcc]


def result(name: str, case: str = "plain") -> Result:
    (item,) = collect.select([f"{name}[{case}]"], package=SAMPLES)[0]
    return execute(item, "model", SAMPLES)


def test_pass() -> None:
    found = result("good.types", "sev")
    assert (found.result, found.rung, found.type, found.text) == ("pass", "model", "sev", "")


def test_a_plain_assert_is_told_with_its_text_and_values() -> None:
    found = result("bad.assertion")
    assert found.result == "fail"
    assert found.text == "assert got == wanted, where got = 3, wanted = 0x1000 (bad.py:17)"


def test_subtests_go_on_after_a_failure_and_the_test_fails() -> None:
    found = result("bad.parts")
    assert [(part.name, part.result) for part in found.parts] == [("good", "pass"), ("bad", "fail"), ("after", "pass")]
    assert found.parts[1].text.startswith("a reason: assert not 'said why'")
    assert (found.result, found.text) == ("fail", "1 of 3 subtests failed: bad")


def test_a_skipped_subtest_does_not_skip_the_test() -> None:
    found = result("good.parts")
    assert found.result == "pass" and [part.result for part in found.parts] == ["pass", "skip"]


def test_a_failing_ioctl_is_told_in_words_and_with_its_place() -> None:
    found = result("bad.ioctl")
    assert (
        found.result == "fail" and "KVM_SET_USER_MEMORY_REGION(slot=0" in found.text and "EINVAL" in found.text and "(bad.py:" in found.text
    )


def test_a_bug_is_told_with_its_traceback() -> None:
    found = result("bad.bug")
    assert found.result == "fail" and "Traceback" in found.text and "a bug of the test" in found.text


def test_what_a_guest_printed_is_in_the_failure() -> None:
    found = result("bad.guest")
    assert found.result == "fail" and "the guest ended with exit code 127" in found.text and "guest exception" in found.text


def test_results_survive_json() -> None:
    found = result("good.parts")
    assert Result.from_json(found.to_json()) == found


def test_an_unknown_fixture_is_named_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def test_types(unheard_of: object) -> None:
        pass

    module = collect.load("good", SAMPLES)
    test_types.__module__ = module.__name__
    monkeypatch.setattr(module, "test_types", test_types)
    found = result("good.types")
    assert found.result == "fail" and "no fixture 'unheard_of'; there are case, host" in found.text
