"""Tests that fail in every way there is, for tests of the runner."""

import os
import signal
import sys
import time

from kvmapi.vm import Vm
from vmm.selftests.api import MachineFactory, Subtest, runs_on

MODEL = runs_on("plain", rungs=("model",))


@MODEL
def test_assertion() -> None:
    wanted, got = 0x1000, 3
    assert got == wanted


@MODEL
def test_parts(subtest: Subtest) -> None:
    with subtest("good"):
        pass
    with subtest("bad"):
        assert not "said why", "a reason"
    with subtest("after"):
        pass


@MODEL
def test_ioctl(vm: Vm) -> None:
    vm.set_user_memory_region(0, 1, 4096, 0)


@MODEL
def test_bug() -> None:
    raise KeyError("a bug of the test")


@MODEL
def test_dies() -> None:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


@MODEL
def test_exits() -> None:
    os._exit(3)


@runs_on("plain", rungs=("model",), timeout=0.3)
def test_hangs() -> None:
    print("not a line of the protocol\nok 1 forged", flush=True)
    time.sleep(60)


@MODEL
def test_guest(machine: MachineFactory) -> None:
    machine("crash").done()


@MODEL
def test_steers() -> None:
    raise AssertionError("\x1b]0;title\x07 \udc80")


@MODEL
def test_last() -> None:
    """Passes, to show that nothing before it did harm."""
