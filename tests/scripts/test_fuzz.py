"""scripts/fuzz: one thread and one seed make the same calls, the log survives a crash and says what was called."""

from __future__ import annotations

import ctypes
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmapi.abi import ioctls
from kvmapi.abi.structs import kvm_userspace_memory_region


@pytest.fixture(autouse=True)
def scripts(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tree / "scripts"))


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    from fuzzlib import main

    monkeypatch.setattr(sys, "argv", ["fuzz", *argv])
    return main.main()


def test_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--calls", "0")
    assert stop.value.code == 2


def test_the_same_seed_makes_the_same_arguments() -> None:
    from fuzzlib.arguments import SCRATCH, Arguments, Memory

    memory = Memory(1)

    def some() -> list[Any]:
        ctypes.memset(memory.scratch[0], 0, SCRATCH)
        source = Arguments(random.Random(5), memory, 0, lambda: [3, 4, 5])
        made: list[Any] = []
        for _ in range(500):
            request = source.request("vm")
            argument = source.argument(request)
            inside = memory.scratch[0] <= argument < memory.scratch[0] + SCRATCH - 64
            made.append((request, argument, ctypes.string_at(argument, 64) if inside else b""))
        return made

    assert some() == some()
    memory.close()


def test_the_log_in_words(tmp_path: Path) -> None:
    from fuzzlib.calls import KEPT, Log

    log = Log(tmp_path / "calls", 2, create=True)
    struct = kvm_userspace_memory_region(slot=7, memory_size=4096)
    for number in range(KEPT + 3):
        log.before(1, number, 5, ioctls.KVM_SET_USER_MEMORY_REGION, 0x1000, bytes(struct))
        log.after(1, number, -22)
    log.before(1, KEPT + 3, 5, ioctls.KVM_RUN, 0, b"")
    again = Log(tmp_path / "calls", 2)
    assert again.counts() == [0, KEPT + 4]
    assert again.last(0) == []
    *_, region, last = again.last(1)
    assert "KVM_SET_USER_MEMORY_REGION" in region and "'slot': 7" in region and region.endswith("-EINVAL")
    assert "KVM_RUN(fd 5" in last and last.endswith("did not return")


@pytest.mark.model
def test_a_crash_is_told_with_its_seed_and_calls(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from fuzzlib import main

    crash = "import os; os.kill(os.getpid(), 11)"
    monkeypatch.setattr(main, "_CHILD", main._CHILD.replace("sys.exit(main())", f"{crash}; sys.exit(main())"))
    assert run(monkeypatch, "--calls", "10", "--seed", "77") == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert f"signal {int(signal.SIGSEGV)}" in said.err and "--seed 77" in said.err
