"""What `--verbose` tells: each thing once, bounded whatever a program does, and how each KVM_RUN ended."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm, sev
from kvmapi.abi.run import kvm_run
from kvmapi.model.caller import Errno
from kvmapi.model.files import File
from vmm.exec import told
from vmm.exec.told import MOST_TOLD, Told


class Memory:
    """The caller's memory: one number wherever one looks; None: nothing is mapped."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number

    def read(self, address: int, size: int) -> bytes:
        if self.number is None:
            raise Errno(errno.EFAULT)
        return self.number.to_bytes(size, "little")


class Heard:
    """A listener, and the lines that it said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.told = Told(self.lines.append)
        self.file = File()
        self.page = bytearray(12288)

    def call(self, on: str, request: int, argument: int, result: int | None, memory: int | None = None, run: bool = False) -> None:
        page = self.page if run else None
        self.told.end(self.told.begin(on, self.file, request, argument, page), result, page, Memory(memory))

    def run(self, result: int = 0, immediate: int = 0, reason: int = kvm.KVM_EXIT_IO) -> None:
        kvm_run.from_buffer(self.page).immediate_exit = immediate
        kvm_run.from_buffer(self.page).exit_reason = reason
        self.call("vcpu", ioctls.KVM_RUN, 0, result, run=True)


@pytest.fixture
def heard() -> Heard:
    return Heard()


def test_devices(heard: Heard) -> None:
    heard.told.opened(os.getpid(), "/dev/kvm", 3)
    heard.told.opened(os.getpid(), "/dev/kvm", 4)
    heard.told.opened(os.getpid(), "/dev/sev", -errno.ENOENT)
    heard.told.opened(os.getpid(), "/dev/kvm", None)
    said = [line.partition(") ")[2] for line in heard.lines]
    assert said == ["opens /dev/kvm", "opens /dev/sev: ENOENT", "opens /dev/kvm: this machine's own"]
    assert heard.told.summary()[0].startswith("opened /dev/kvm 2 times; 0 ioctls")


def test_machines_and_their_types(heard: Heard) -> None:
    for number, result in ((3, 5), (0, 6), (0, 7), (4, -errno.EINVAL)):
        heard.call("system", ioctls.KVM_CREATE_VM, number, result)
    heard.call("vm", ioctls.KVM_MEMORY_ENCRYPT_OP, 0x1000, 0, sev.KVM_SEV_ES_INIT)
    heard.call("vm", ioctls.KVM_MEMORY_ENCRYPT_OP, 0x1000, 0, sev.KVM_SEV_LAUNCH_FINISH)
    assert heard.lines == [
        "makes a VM of type 3 (SEV_ES), number 1",
        "makes a VM of type 0 (DEFAULT), number 2",
        "makes a VM of type 0 (DEFAULT), number 3",
        "KVM_CREATE_VM of type 4 (SNP): EINVAL",
        "a VM becomes a SEV_ES guest (KVM_SEV_ES_INIT, the way before VM types)",
    ]
    assert "VMs: 2 of type 0 (DEFAULT), 1 of type 3 (SEV_ES)" in heard.told.summary()[0]


def test_capability_that_is_not_there_is_told_once(heard: Heard) -> None:
    for on, result in (("system", 0), ("vm", 0), ("vm", 1)):
        heard.call(on, ioctls.KVM_CHECK_EXTENSION, caps.KVM_CAP_NESTED_STATE, result)
    heard.call("vm", ioctls.KVM_ENABLE_CAP, 0x1000, -errno.EINVAL, caps.KVM_CAP_NESTED_STATE)
    heard.call("vm", ioctls.KVM_ENABLE_CAP, 0x1000, 0, caps.KVM_CAP_NESTED_STATE)
    assert heard.lines == [
        "asked for KVM_CAP_NESTED_STATE: the answer is 0, it is not there",
        "KVM_ENABLE_CAP KVM_CAP_NESTED_STATE on a vm fd: EINVAL",
    ]


def test_unknown_calls_by_name(heard: Heard) -> None:
    heard.file.handlers[ioctls.KVM_GET_REGS] = lambda arg, caller: 0
    heard.file.unknown_errno = lambda: errno.EINVAL  # type: ignore[method-assign]  # as a vCPU's
    for _ in range(2):
        heard.call("vcpu", ioctls.KVM_GET_REGS, 0, -errno.EINVAL)  # known, and refused for another reason
        heard.call("vcpu", ioctls.KVM_GET_NESTED_STATE, 0, -errno.EINVAL)
        heard.call("vm", ioctls.KVM_MEMORY_ENCRYPT_OP, 0x1000, -errno.ENOTTY, sev.KVM_SEV_LAUNCH_START)
        heard.call("vm", ioctls.KVM_MEMORY_ENCRYPT_OP, 0x1000, -errno.ENOTTY)
        heard.call("vm", 0xAEFE, 0, -errno.ENOTTY)
        heard.call("system", ioctls.KVM_GET_PIT, 0, -errno.ENOTTY)
    assert heard.lines == [
        "KVM_GET_NESTED_STATE on a vcpu fd: EINVAL, there is no such call",
        "KVM_MEMORY_ENCRYPT_OP KVM_SEV_LAUNCH_START on a vm fd: ENOTTY, there is no such call",
        "KVM_MEMORY_ENCRYPT_OP on a vm fd: ENOTTY, there is no such call",
        "ioctl 0x0000aefe on a vm fd: ENOTTY, there is no such call",
        "KVM_GET_PIT on /dev/kvm: ENOTTY, there is no such call",
    ]


def test_how_each_run_ended(heard: Heard) -> None:
    for _ in range(3):
        heard.run()
    heard.run(-errno.EINTR)
    heard.run(-errno.EINTR, immediate=1)
    heard.run(-errno.EFAULT, reason=kvm.KVM_EXIT_MEMORY_FAULT)
    heard.run(-errno.EFAULT)
    assert heard.told.summary()[1] == ("KVM_RUN returned 7 times: IO 3, INTR (signal) 1, INTR (immediate_exit) 1, MEMORY_FAULT 1, EFAULT 1")
    assert heard.lines == []


def test_a_hostile_program_cannot_make_it_long(heard: Heard) -> None:
    for number in range(3000):
        heard.call("system", ioctls.KVM_CHECK_EXTENSION, 1000 + number, 0)
        heard.call("vm", 0xAE000000 + number, 0, -errno.ENOTTY)
        heard.call("system", ioctls.KVM_CREATE_VM, number << 32, -errno.EINVAL)
        heard.call("system", ioctls.KVM_CREATE_VM, 0, 5)
        heard.told.opened(number, "/sys/module/kvm/\x1b[2J\n" + "x" * 4000, -errno.ENOENT)
        heard.run(reason=1000 + number)
    assert len(heard.lines) == 4 * MOST_TOLD
    assert all(line.isprintable() and len(line) < 200 for line in heard.lines)
    summary = heard.told.summary()
    assert sum(map(len, summary)) < 4096
    assert f"{3000 - MOST_TOLD} more about ioctls were not told" in summary
    assert "others 2936" in summary[1]
    assert max(map(len, heard.told._seen.values())) <= told._MOST_KEPT


def test_a_page_that_is_gone(heard: Heard) -> None:
    import mmap

    page: Any = mmap.mmap(-1, 4096)
    begun = heard.told.begin("vcpu", heard.file, ioctls.KVM_RUN, 0, page)
    page.close()
    heard.told.end(begun, 0, page, Memory())
    heard.told.end(heard.told.begin("vcpu", heard.file, ioctls.KVM_RUN, 0, page), 0, None, Memory())
    assert heard.told.summary()[1] == "KVM_RUN returned 2 times: unknown 2"


def test_the_machines_own_kvm(heard: Heard) -> None:
    heard.call("system", ioctls.KVM_CREATE_VM, 0, None)
    heard.call("system", ioctls.KVM_CHECK_EXTENSION, 3, None)
    assert heard.lines == ["makes VMs of type 0 (DEFAULT) on this machine's own KVM"]
