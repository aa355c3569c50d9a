"""scripts/fuzz: one thread and one seed make the same calls, the log survives a crash and says what was called; of hostile snippets, that
each ends, that a crash, a hang and an exception are findings with the command that repeats them; of SEV commands the same, and that
what the reference would not say, and what is kept, is found.
"""

from __future__ import annotations

import ctypes
import json
import random
import signal
import subprocess
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


@pytest.mark.model
def test_snippets(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A short run: every mode had its turn, every KVM_RUN ended with a type or a kick, and nothing was found."""
    assert run(monkeypatch, "snippets", "--count", "1500", "--seed", "3", "--processes", "2") == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["snippets"] == 1500 and summary["findings"] == []
    assert set(summary["modes"]) == {"real", "protected", "paged", "pae", "long", "user", "compatible"}
    assert {"HLT", "SHUTDOWN", "MMIO", "IO", "timeout"} <= set(summary["exits"])


@pytest.mark.model
@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        ("os.abort()", "ends the process with status -6 in KVM_RUN"),
        ("time.sleep(3600)", "hangs for 10 s in KVM_RUN"),
        ("raise ValueError('not typed')", "ValueError: not typed"),
    ],
)
def test_what_a_snippet_may_not_do_is_found(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], break_it: str, said: str
) -> None:
    """The third snippet does it in KVM_RUN: it is named, the others run all the same."""
    from fuzzlib import snippets

    broken = f"""
import os, time
from fuzzlib import hostile
from kvmapi.vcpu import Vcpu
one, run, number = hostile.Machine.one, Vcpu.run, [0]
def _one(self, index):
    number[0] = index
    return one(self, index)
def _run(self):
    if number[0] == 2:
        {break_it}
    return run(self)
hostile.Machine.one, Vcpu.run = _one, _run
"""
    monkeypatch.setattr(snippets, "_CHILD", snippets._CHILD.replace("from fuzzlib.snippets", f"exec({broken!r}); from fuzzlib.snippets"))
    monkeypatch.setattr(snippets, "HANG", 10.0 if "sleep" in break_it else 30.0)
    assert run(monkeypatch, "snippets", "--count", "6", "--seed", "3", "--processes", "1") == 1
    captured = capfd.readouterr()
    summary = json.loads(captured.out)
    assert [finding["index"] for finding in summary["findings"]] == [2] and said in summary["findings"][0]["what"]
    assert "--seed 3 --first 2 --count 1" in captured.err


@pytest.mark.model
@pytest.mark.parametrize("subject", ["snippets", "sev"])
def test_ctrl_c_ends_the_processes_and_says_how_far_it_was(
    subject: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fuzzlib import processes

    started: list[subprocess.Popen[bytes]] = []
    look = processes._Place.look

    def interrupted(place: Any) -> Any:
        assert place.process is not None
        started.append(place.process)
        if place.done() > 1:
            raise KeyboardInterrupt
        return look(place)

    monkeypatch.setattr(processes._Place, "look", interrupted)
    assert run(monkeypatch, subject, "--count", "1000000", "--processes", "2") == 130
    said = capfd.readouterr()
    summary = json.loads(said.out)
    assert summary["interrupted"] and summary["findings"] == [] and 1 < summary[{"sev": "sequences"}.get(subject, subject)] < 1000000
    assert said.err.endswith("fuzz: interrupted\n")
    assert all(process.poll() is not None for process in started)


@pytest.mark.model
def test_a_snippet_is_the_same_each_time() -> None:
    """Seed and index make the code and the page tables."""
    from fuzzlib import hostile

    from kvmapi.model.host import ModelHost

    seen = []
    for _ in range(2):
        machine = hostile.Machine(ModelHost(), 4, lambda *_: None)
        machine._run = lambda *_: None  # what it begins with
        seen.append([(machine.one(index), bytes(machine._memory)) for index in range(40) if index != 1])
        machine.close()
    assert seen[0] == seen[1] and len({memory for _, memory in seen[0]}) == len(seen[0])


@pytest.mark.model
def test_sev(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A short run: sequences in two processes, calls that succeed and calls that are refused, and nothing found."""
    assert run(monkeypatch, "sev", "--count", "16", "--steps", "80", "--seed", "3", "--processes", "2") == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["sequences"] == 16 and summary["findings"] == []
    assert summary["calls"] > 800 and 0 < summary["succeeded"] < summary["calls"]
    assert {"KVM_SEV_LAUNCH_START 0", "KVM_SEV_LAUNCH_START EIO"} <= set(summary["answers"])


@pytest.mark.model
@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        ("os.abort()", "ends the process with status -6"),
        ("raise ValueError('not an errno')", "ValueError: not an errno"),
        ("self.state = 1", "state 1, not 3"),
        ("kept.append(os.dup(0))", "fds left open"),
    ],
)
def test_what_a_sev_command_may_not_do_is_found(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], break_it: str, said: str
) -> None:
    """LAUNCH_FINISH does it once in a while: the sequence is named, and repeated with the command that is printed."""
    from fuzzlib import sev

    broken = f"""
import os
from kvmapi.model.sev.guest import GuestContext
finish, kept = GuestContext.finish, []
def _finish(self):
    finish(self)
    {break_it}
GuestContext.finish = _finish
"""
    monkeypatch.setattr(sev, "_CHILD", sev._CHILD.replace("from fuzzlib.sev", f"exec({broken!r}); from fuzzlib.sev"))
    assert run(monkeypatch, "sev", "--count", "12", "--steps", "60", "--seed", "3", "--processes", "1") == 1
    captured = capfd.readouterr()
    findings = json.loads(captured.out)["findings"]
    assert any(said in finding["what"] for finding in findings)
    assert f"--seed 3 --steps 60 --first {findings[0]['index']} --count 1" in captured.err


@pytest.mark.model
def test_a_sev_finding_is_made_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many steps those stay without which nothing goes wrong."""
    from random import Random

    from fuzzlib import sev

    from kvmapi.model.sev.guest import GuestContext
    from tests.model.sev_rules import sequence

    finish = GuestContext.finish

    def wrong(self: GuestContext) -> None:
        finish(self)
        self.policy ^= 1

    monkeypatch.setattr(GuestContext, "finish", wrong)
    steps = next(steps for seed in range(20) if sev.follow(steps := sequence(Random(seed), 60))[1])
    few = sev.shorten(steps)
    assert len(few) <= 4 and sev.follow(few)[1], few
