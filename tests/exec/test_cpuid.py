"""CPUID in a program under `sevmm exec` is the modelled machine's, and nothing else about the program changes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvmapi.model.platform import C_BIT, Platform
from tests.exec.conftest import Build
from tests.exec.launching import Under, read_line
from vmm.exec.tracing import cpuid

pytestmark = [pytest.mark.gcc, pytest.mark.model]

MODELS = f"AuthenticAMD sev 1 cbit {C_BIT}"
AES, AVX, OSXSAVE, MWAIT, SVM = 1 << 25, 1 << 28, 1 << 27, 1 << 3, 1 << 2


@pytest.fixture
def faulting() -> None:
    """Skip where this processor cannot do it; what programs see there is said in docs/exec.md."""
    if "cpuid_fault" not in Path("/proc/cpuinfo").read_text(encoding="ascii"):
        pytest.skip("the processor cannot make CPUID fault (no cpuid_fault in /proc/cpuinfo); get it: another machine")


# ---- what is told
def test_features_are_those_of_both_machines() -> None:
    here = {1: (1, 0x55AA0800, AVX | OSXSAVE, 0xFFFFFFFF), 7: (0, 1, 2, 3), 0x80000001: (0, 0, 0, 0)}

    def this(function: int, index: int) -> cpuid.Answer:
        return here.get(function, (7, 7, 7, 7))

    model = Platform().host_cpuid
    eax, ebx, ecx, edx = cpuid.seen(model, this, 1, 0)
    assert (eax, ebx, ecx) == (0x00800F12, 0x55AA0800, OSXSAVE | MWAIT) and edx, "this machine's APIC id; AES only where both have it"
    assert cpuid.seen(model, this, 7, 0)[1] == 1
    assert cpuid.seen(model, this, 0xD, 0) == (7, 7, 7, 7), "XSAVE's area is as large as this machine makes it"
    assert cpuid.seen(model, this, 0x8000001F, 0)[1] & 63 == C_BIT and cpuid.seen(model, this, 0x40000000, 0) == (0, 0, 0, 0)
    assert cpuid.seen(model, this, 0x80000001, 0)[3] & 1 << 29 == 0, "long mode is this machine's to say"
    assert cpuid.seen(model, this, 0x80000001, 0)[2] & SVM, "a machine with kvm_amd has it, whatever this one has"


def test_this_machine_can_be_asked() -> None:
    vendor = next((line for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines() if line.startswith("vendor_id")), "")
    _, first, third, second = cpuid.native(0, 0)
    assert b"".join(word.to_bytes(4, "little") for word in (first, second, third)).decode() == vendor.split()[-1]


# ---- in programs
def test_threads_and_children_see_the_model(build: Build, under: Under, faulting: None) -> None:
    done = under.run(build("cpuid"), "show")
    assert done.stdout.splitlines() == [f"{who} {MODELS}" for who in ("main", "thread", "child")], done.stderr


def test_the_platform_decides(build: Build, under: Under, faulting: None) -> None:
    done = replace(under, options=("--platform", "none")).run(build("cpuid"), "show")
    assert "AuthenticAMD sev 0 cbit 0" in done.stdout, done.stdout + done.stderr


def test_the_machines_own_on_request(build: Build, under: Under) -> None:
    native = Under("native").run(build("cpuid"), "show")
    done = replace(under, options=("--cpuid", "host")).run(build("cpuid"), "show")
    assert done.stdout == native.stdout


def test_static_programs(build: Build, under: Under, faulting: None) -> None:
    """Their first file is the first of their own."""
    done = under.run(build("plain", "-static"))
    assert done.returncode == 0 and "wrong: 0" in done.stdout, done.stdout + done.stderr


def test_the_programs_own_faults_are_its_own(build: Build, under: Under, faulting: None) -> None:
    done = under.run(build("cpuid"), "segv")
    assert done.stdout.splitlines() == ["fault at 0x1234", f"after {MODELS}"], done.stderr
    done = under.run(build("cpuid"), "die")
    assert done.stdout == f"before {MODELS}\n" and done.returncode == -signal.SIGSEGV


def test_a_new_image_begins_anew(build: Build, under: Under, faulting: None) -> None:
    done = under.run(build("cpuid"), "exec", build("cpuid"), "show")
    assert done.stdout.startswith(f"old {MODELS}\nmain {MODELS}\n"), done.stdout + done.stderr
    done = under.run(build("cpuid"), "threadexec", build("cpuid"), "show")
    assert done.stdout.startswith(f"main {MODELS}\n"), done.stdout + done.stderr
    done = under.run(build("cpuid"), "exec", "sh", "-c", "exit 3")
    assert done.returncode == 3 and done.stdout == f"old {MODELS}\n"


def test_children_by_vfork(build: Build, under: Under, faulting: None) -> None:
    done = under.run(build("cpuid"), "spawn")
    assert done.stdout == f"status 3\nmain {MODELS}\n", done.stderr


def _waits_traced(pid: int) -> bool:
    """Is the only child of `pid` followed, and asleep in a call of its own (not in one that is held: that is state D)?"""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    if not children:
        return False
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{children[0]}/status").read_text(encoding="ascii").splitlines())
    return rows["State"].split()[0] == "S" and rows["TracerPid"].strip() != "0"


def test_a_first_open_that_waits_is_made_again(build: Build, under: Under, faulting: None, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = under.start([build("cpuid", "-static"), "read", fifo])
    limit = time.monotonic() + 20
    while not _waits_traced(process.pid):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        os.sched_yield()
    with open(fifo, "wb", buffering=0) as writer:  # waits for the reader
        writer.write(b"word")
    out, err = process.communicate(timeout=20)
    assert out.splitlines()[1:] == [f"main {MODELS}"] and "read 4 word" in out, out + err
    under.nothing_left()


def test_stops_stay_stops(build: Build, under: Under, faulting: None) -> None:
    process = under.start([build("cpuid"), "stop"])
    assert read_line(process) == f"before {MODELS}\n"
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[1])
    stat = Path(f"/proc/{pid}/stat")
    while stat.read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "tT":
        os.sched_yield()
    os.kill(pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=20)
    assert out == f"after {MODELS}\n" and process.returncode == 0
    under.nothing_left()


def test_threads_that_come_and_go(build: Build, under: Under, faulting: None) -> None:
    done = under.run(build("cpuid"), "many")
    assert done.stdout == "signals 800\n" and done.returncode == 0, done.stderr


def test_ended_children_can_be_waited_for_at_once(build: Build, under: Under) -> None:
    done = under.run(build("cpuid"), "wait")
    assert done.stdout == "waited\n" and done.returncode == 0, done.stdout + done.stderr


def test_calls_that_no_signal_ends(build: Build, under: Under, faulting: None) -> None:
    """A signal may come before we have received a call. Of a program that is traced such a call is made again."""
    done = under.run(build("interrupted"))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
