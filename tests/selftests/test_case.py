"""Where a test runs, and why it is skipped where nothing can run it."""

from __future__ import annotations

import pytest

from vmm.rungs import Unsupported
from vmm.selftests import case
from vmm.selftests.case import RunsOn, Skip, find_case


def no_kernel(type: str, needs: frozenset[str]) -> str:
    raise Unsupported("this kernel has no such thing", "get another")


def test_the_kernel_is_taken_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "_kernel", lambda type, needs: "it can")
    found = find_case("sev", "mainline", RunsOn())
    assert (found.rung, found.reason, found.id, found.vm_type) == ("kernel", "it can", "sev", 2)


def test_the_model_where_the_kernel_cannot_with_the_kernels_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "_kernel", no_kernel)
    found = find_case("plain", "mainline", RunsOn())
    assert (found.rung, found.reason) == ("model", "this kernel has no such thing")


@pytest.mark.parametrize(("on", "rungs"), [("kernel", ("kernel", "model")), ("auto", ("kernel",))])
def test_skipped_where_only_the_kernel_will_do_and_it_cannot(monkeypatch: pytest.MonkeyPatch, on: str, rungs: tuple[str, ...]) -> None:
    monkeypatch.setattr(case, "_kernel", no_kernel)
    monkeypatch.setattr(case, "_doctor", lambda type, needs: "what the doctor says")
    with pytest.raises(Skip, match=r"^what the doctor says$"):
        find_case("sev", "mainline", RunsOn(rungs=rungs), on)


def test_a_rung_that_the_test_is_not_for() -> None:
    with pytest.raises(Skip, match="for the model only"):
        find_case("plain", "mainline", RunsOn(rungs=("model",)), "kernel")


def test_other_dialects_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "_kernel", lambda type, needs: "it can")
    found = find_case("sev", "upm-v7", RunsOn())
    assert (found.rung, found.id) == ("model", "sev-upm-v7")
    with pytest.raises(Skip, match="mainline dialect, not upm-v7"):
        find_case("sev", "upm-v7", RunsOn(), "kernel")


def test_a_dialect_that_the_model_does_not_speak_is_a_skip() -> None:
    with pytest.raises(Skip, match="does not speak the dialect klingon"):
        find_case("sev", "klingon", RunsOn(), "model").new_host()


def test_the_model_of_a_case_is_not_the_users_platform() -> None:
    """Its keys are in no file: a test may not touch what `sevmm platform` keeps."""
    host = find_case("sev", "mainline", RunsOn(), "model").new_host()
    assert host.platform.store is None  # type: ignore[attr-defined]
