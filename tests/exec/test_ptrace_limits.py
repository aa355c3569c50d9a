"""A process that is held does not do what it is told: nobody waits for it for ever."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.exec.tracing import ptrace

CALL, SPIN = b"\x0f\x05", b"\xeb\xfe"  # syscall; a jump to itself
GETPID, VFORK = 39, 58


@contextlib.contextmanager
def held(code: bytes) -> Iterator[tuple[ptrace.Hold, int, int]]:
    """A stopped child that runs a loop in memory of its own; then `code` is at the address that comes last."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)  # shared with the child
    memory[: len(SPIN)] = SPIN
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pid = os.fork()
    if not pid:
        ctypes.CFUNCTYPE(None)(at)()
        os._exit(1)
    memory[256 : 256 + len(code)] = code
    hold = ptrace.Hold(pid)
    try:
        limit = time.monotonic() + 10
        while ptrace.state(pid, pid) != "R" or not cpu_time(pid):
            assert time.monotonic() < limit
            time.sleep(0.01)
        hold.seize(pid)
        hold.interrupt(pid)
        assert hold.wait(pid)[0] == ptrace.Stop.EVENT
        yield hold, pid, at + 256
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def cpu_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


@pytest.mark.parametrize(("code", "failure"), [(SPIN, TimeoutError), (b"\xf4", OSError)])
def test_code_that_makes_no_system_call(code: bytes, failure: type[OSError], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptrace, "PATIENCE", 0.2)
    with held(code) as (hold, pid, at):
        before = bytes(hold.registers(pid))
        began = time.monotonic()
        with pytest.raises(failure), hold.borrowed(pid):
            hold.call(pid, at, GETPID)
        assert time.monotonic() - began < 10
        assert bytes(hold.registers(pid)) == before
        used = cpu_time(pid)
        hold.let_go()
        limit = time.monotonic() + 10
        while cpu_time(pid) == used:  # it goes on
            assert time.monotonic() < limit
            time.sleep(0.01)


def test_a_system_call_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with held(CALL) as (hold, pid, at):
        with hold.borrowed(pid):
            assert hold.call(pid, at, GETPID) == pid
        hold.let_go()


def test_a_thread_that_the_kernel_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent of a vfork(2) waits for its child, whatever it is asked."""
    monkeypatch.setattr(ptrace, "PATIENCE", 0.2)
    monkeypatch.setattr(ptrace, "LAST", 0.6)
    with held(CALL + SPIN) as (hold, pid, at):
        children: list[int] = []
        try:
            with pytest.raises(ProcessLookupError), hold.borrowed(pid):
                children_of = Path(f"/proc/{pid}/task/{pid}/children")
                monkeypatch.setattr(ptrace, "state", watched(children_of, children))
                hold.call(pid, at, VFORK)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
        assert children
        limit = time.monotonic() + 10
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            assert time.monotonic() < limit
            time.sleep(0.01)


def watched(file: Path, found: list[int]) -> object:
    """ptrace.state, which notes a process's children on the way: they are somebody else's once it has ended."""
    real = ptrace.state

    def state(tgid: int, tid: int) -> str:
        with contextlib.suppress(OSError):
            found[:] = map(int, file.read_text().split()) or found
        return real(tgid, tid)

    return state
