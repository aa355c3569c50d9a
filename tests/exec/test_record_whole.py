"""`sevmm exec --record` around the project's own VMM: a SEV launch with a secret, and a recording that tells everything but that."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require

pytestmark = [pytest.mark.model, pytest.mark.gcc]

TREE = Path(__file__).parents[2]
ASKS = """
import ctypes, errno, os, sys
from kvmapi.abi import caps, ioctls, kvm
from kvmapi.kernel import KernelHost
from kvmapi.system import System
with System(KernelHost()) as system, system.create_vm(kvm.KVM_X86_SW_PROTECTED_VM) as vm, vm.create_vcpu() as vcpu:
    vm.check_extension(caps.KVM_CAP_NESTED_STATE), vm.check_extension(caps.KVM_CAP_NESTED_STATE)
    assert vm.ioctl_raw(0xAEFE) == -errno.ENOTTY
    os.close(vm.ioctl_raw(ioctls.KVM_GET_STATS_FD))
    vm.ioctl_raw(ioctls.KVM_GET_STATS_FD), vm.ioctl_raw(ioctls.KVM_GET_STATS_FD)
    vcpu.kvm_run.immediate_exit = 1
    vcpu.kvm_run.cr8 = 3
    assert vcpu.run() == errno.EINTR
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap(None, ctypes.c_size_t(4096), 3, 1, vm.fd, ctypes.c_long(0))
    assert ctypes.get_errno() == errno.ENODEV
os.kill(os.getpid(), 15)
"""
"""A program that asks for what is not there, gives KVM_RUN something to do, and is killed."""

SECRET = b"correct horse battery staple"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """The recording, and what the guest printed."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "secret").write_bytes(SECRET)
    sevmm = [sys.executable, "-m", "vmm.cli"]
    inner = [*sevmm, "run", "secret", "--type", "sev", "--on", "kernel", "--secret", str(folder / "secret"), "--arguments", "nonce=n1"]
    done = subprocess.run(
        [*sevmm, "exec", "--record", str(folder / "log"), "--", *inner], cwd=TREE, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return (folder / "log").read_bytes(), done.stdout


def test_a_new_file_is_its_owners_and_a_fifo_is_opened_once(tmp_path: Path) -> None:
    log, pipe = tmp_path / "log", tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "vmm.cli", "exec", "--record"]
    subprocess.run([*command, str(log), "--", "true"], cwd=TREE, timeout=60, check=True)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        try:
            subprocess.run([*command, str(pipe), "--", "true"], cwd=TREE, timeout=60, check=True)
            text = reader.communicate(timeout=10)[0]
        finally:
            reader.kill()
    assert [json.loads(line).get("end") for line in text.splitlines()][-1] == "complete"


def test_a_place_that_cannot_be_written_is_a_mistake() -> None:
    command = [sys.executable, "-m", "vmm.cli", "exec", "--record", "/dev/null/log", "--", "echo", "started"]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sevmm exec: /dev/null/log cannot be written: not a directory\n"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """The recording of ASKS, and what was told of it."""
    log = tmp_path_factory.mktemp("asked") / "log"
    command = [sys.executable, "-m", "vmm.cli", "exec", "--verbose", "--record", str(log), "--", sys.executable, "-c", ASKS]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -15, done.stderr
    return log.read_bytes(), done.stderr


def test_statistics_that_are_one_file_to_us_have_no_end(asked: tuple[bytes, str]) -> None:
    made = [(line["made"]["on"], line["made"]["file"]) for line in lines(asked) if "made" in line]
    released = [(line["on"], line["file"]) for line in lines(asked) if line.get("call") == "release"]
    assert sum(kind == "stats" for kind, _ in made) == 3
    assert sorted(released) == sorted(file for file in made if file[0] != "stats")


def test_what_kvm_run_was_asked_for(asked: tuple[bytes, str]) -> None:
    ran = [line for line in lines(asked) if line.get("ioctl") == "KVM_RUN"]
    assert [(line["in"], line["exit"], line["result"]) for line in ran] == [({"immediate_exit": 1, "cr8": "0x3"}, {"reason": "INTR"}, -4)]


def test_mapping_that_is_refused_has_its_result(asked: tuple[bytes, str]) -> None:
    mapped = [(line["on"], line.get("error")) for line in lines(asked) if line.get("call") == "mmap"]
    assert mapped == [("vcpu", None), ("vm", "ENODEV (no such device)")]


def test_told_while_it_runs_and_at_its_end(asked: tuple[bytes, str]) -> None:
    told = [line.removeprefix("sevmm exec: ") for line in asked[1].splitlines()]
    assert sum("opens /dev/kvm" in line for line in told) == 1
    assert told[1:6] == [
        "makes a VM of type 1 (SW_PROTECTED), number 1",
        "asked for KVM_CAP_NESTED_STATE: the answer is 0, it is not there",
        "ioctl 0x0000aefe on a vm fd: ENOTTY, there is no such call",
        told[4],
        "KVM_RUN returned once: INTR (immediate_exit) 1",
    ]
    assert told[4].startswith("opened /dev/kvm once; ") and told[4].endswith("VMs: 1 of type 1 (SW_PROTECTED)")
    assert told[-1] == f"{sys.executable} was killed by SIGTERM"


def lines(recorded: tuple[bytes, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in recorded[0].splitlines()]


def test_launch_is_told_step_by_step(recorded: tuple[bytes, str]) -> None:
    assert f"secret: {len(SECRET)} bytes arrived" in recorded[1]
    found = [line["command"] for line in lines(recorded) if "command" in line and line["result"] == 0]
    steps = ("KVM_SEV_INIT2", "KVM_SEV_LAUNCH_START", "KVM_SEV_LAUNCH_UPDATE_DATA", "KVM_SEV_LAUNCH_MEASURE", "KVM_SEV_LAUNCH_SECRET")
    at = [found.index(step) for step in (*steps, "KVM_SEV_LAUNCH_FINISH")]
    assert at == sorted(at)
    assert lines(recorded)[-1]["end"] == "complete"


def test_files_keep_their_numbers(recorded: tuple[bytes, str]) -> None:
    kinds: dict[int, set[str]] = {}
    for line in lines(recorded):
        if line.get("call") == "ioctl":
            kinds.setdefault(line["file"], set()).add(line["on"])
    assert all(len(found) == 1 for found in kinds.values())
    assert set().union(*kinds.values()) >= {"system", "vm", "vcpu", "sev"}


def test_every_file_begins_and_ends(recorded: tuple[bytes, str]) -> None:
    made = [(line["made"]["on"], line["made"]["file"]) for line in lines(recorded) if "made" in line]
    released = [(line["on"], line["file"]) for line in lines(recorded) if line.get("call") == "release"]
    assert len(set(made)) == len(made)
    assert sorted(made) == sorted(released)
    assert {kind for kind, _ in made} >= {"system", "vm", "vcpu", "sev"}
    opened = [line for line in lines(recorded) if line.get("call") == "open" and line.get("made", {}).get("on") == "sev"]
    assert opened[0]["in"]["path"] == "/dev/sev" and opened[0]["result"] > 2


def test_the_vcpus_page_is_mapped_before_it_runs(recorded: tuple[bytes, str]) -> None:
    order = [line.get("call") if line.get("call") == "mmap" else line.get("ioctl") for line in lines(recorded) if line.get("on") == "vcpu"]
    assert order.index("mmap") < order.index("KVM_RUN")
    mapped = next(line for line in lines(recorded) if line.get("call") == "mmap")
    assert mapped["in"]["length"] == 12288 and "result" not in mapped


def test_exits_are_decoded(recorded: tuple[bytes, str]) -> None:
    exits = [line["exit"] for line in lines(recorded) if "exit" in line]
    assert {found["reason"] for found in exits} == {"IO"}
    assert bytes(int(found["data"], 16) for found in exits if found["port"] == "0x3f8" and found["size"] == 1).startswith(b"secret: ")


def test_no_payload(recorded: tuple[bytes, str]) -> None:
    log = recorded[0]
    for part in (SECRET[:8], SECRET.hex()[:16].encode(), SECRET[::-1].hex()[:16].encode()):
        assert part not in log
    secret = next(line for line in lines(recorded) if line.get("command") == "KVM_SEV_LAUNCH_SECRET")
    assert set(secret["in"]) == {"hdr_uaddr", "hdr_len", "guest_uaddr", "guest_len", "trans_uaddr", "trans_len"}


def test_what_the_machines_own_kvm_answers_has_no_result(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    require(request.config, "kvm")
    code = "import os; from kvmapi.kernel import KernelHost; from kvmapi.system import System; s = System(KernelHost())"
    command = [sys.executable, "-m", "vmm.cli", "exec", "--verbose", "--fallthrough", "--record", str(tmp_path / "log"), "--"]
    program = [sys.executable, "-c", f"{code}; s.create_vm(0).close(); s.create_vm(2).close()"]
    done = subprocess.run([*command, *program], cwd=TREE, capture_output=True, text=True, timeout=60, check=True)
    log = [json.loads(line) for line in (tmp_path / "log").read_bytes().splitlines()[1:-1]]
    opened = next(line for line in log if line["call"] == "open")
    assert opened["in"]["path"] == "/dev/kvm" and "result" not in opened and "made" not in opened
    made = [line for line in log if line.get("ioctl") == "KVM_CREATE_VM"]
    assert [("result" in line, line.get("made", {}).get("on")) for line in made] == [(False, None), (True, "vm")]
    assert "makes VMs of type 0 (DEFAULT) on this machine's own KVM" in done.stderr
    assert "makes a VM of type 2 (SEV), number 1" in done.stderr
