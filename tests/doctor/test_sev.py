"""Facts of SEV's own, on made-up hosts: ASIDs of each kind, what the security processor says; and that doctor and exceptions agree."""

from __future__ import annotations

import ctypes
import errno
import os
import types
from dataclasses import dataclass, field

import pytest

from kvmapi import errors
from kvmapi.abi import psp, structs
from kvmapi.remedies import Remedy, open_device
from kvmapi.table import named
from tests.doctor.conftest import Machine, PlayedHost
from tests.doctor.test_doctor import AMD, sev_host
from vmm import doctor, doctor_sev
from vmm.facts import NO, OK, UNKNOWN

CAPACITY, CURRENT = "/sys/fs/cgroup/misc.capacity", "/sys/fs/cgroup/misc.current"


@dataclass
class PlayedPlatform(PlayedHost):
    """A /dev/sev that answers SEV_PLATFORM_STATUS."""

    status: psp.sev_user_data_status = field(default_factory=lambda: psp.sev_user_data_status(0, 24, 1, 0x101, 15, 3))
    refuse: int = 0
    code: int = psp.SEV_RET_NO_FW_CALL
    flags: list[int] = field(default_factory=list)

    def open(self, path: str, flags: int) -> int:
        self.flags.append(flags & 3)
        return super().open(path, flags)

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        if request != psp.SEV_ISSUE_CMD:
            return super().ioctl(fd, request, arg)
        command = psp.sev_issue_cmd.from_address(arg)
        assert command.cmd == psp.SEV_PLATFORM_STATUS, "nothing that changes the platform"
        if self.refuse:
            command.error = self.code
            return -self.refuse
        ctypes.memmove(command.data, ctypes.addressof(self.status), ctypes.sizeof(self.status))
        return 0


def test_asids(machine: Machine) -> None:
    where = machine({CAPACITY: "sev 10\nsev_es 5\nother max\n", CURRENT: "sev 3\nsev_es 5\n"})
    free, full = doctor_sev.asids(where, "sev"), doctor_sev.asids(where, "sev-es")
    assert (free.state, full.state) == (OK, NO)
    assert "10 ASIDs of sev, 3 taken" in free.evidence and "5 ASIDs of sev_es, 5 taken" in full.evidence
    assert full.remedy == Remedy.ASIDS_SEV_ES


def test_a_kind_without_asids(machine: Machine) -> None:
    """Every ASID given to SEV-ES: plain SEV has none, nobody took any, and no guest fits."""
    fact = doctor_sev.asids(machine({CAPACITY: "sev 0\nsev_es 5\n"}), "sev")
    assert (fact.state, fact.remedy) == (NO, Remedy.ASIDS_SEV)


def test_asids_where_nobody_counts(machine: Machine) -> None:
    for files in ({}, {CAPACITY: ""}, {CAPACITY: "sev many\nsev_es\n"}):
        assert doctor_sev.asids(machine(files), "sev").state == UNKNOWN


def test_firmware() -> None:
    host = PlayedPlatform()
    fact = doctor_sev.firmware(lambda: host)
    assert fact.state == OK
    assert fact.evidence == "SEV_PLATFORM_STATUS: API 0.24 build 15, INIT, externally owned, SEV-ES set up, 3 guests"
    assert host.opened == set() and host.flags == [0], "closed again; opened for reading only"


def test_old_firmware() -> None:
    fact = doctor_sev.firmware(lambda: PlayedPlatform(status=psp.sev_user_data_status(0, 16, 0, 0, 1, 0)))
    assert (fact.state, fact.remedy) == (NO, Remedy.FIRMWARE)
    assert "API 0.16 build 1, UNINIT, self-owned, 0 guests; older than API 0.17" in fact.evidence


@pytest.mark.parametrize(
    ("number", "code", "words", "remedy"),
    [
        (errno.ENODEV, psp.SEV_RET_NO_FW_CALL, "ENODEV", Remedy.CCP),
        (errno.EIO, psp.SEV_RET_HWSEV_RET_UNSAFE, "HWSEV_RET_UNSAFE (a hardware error", Remedy.HARDWARE),
        (errno.EIO, 0x1E, "EIO", Remedy.CCP),
    ],
)
def test_firmware_that_refuses(number: int, code: int, words: str, remedy: str) -> None:
    host = PlayedPlatform(refuse=number, code=code)
    fact = doctor_sev.firmware(lambda: host)
    assert (fact.state, fact.remedy) == (NO, remedy)
    assert words in fact.evidence and host.opened == set()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENXIO])
def test_no_dev_sev(number: int) -> None:
    fact = doctor_sev.firmware(lambda: PlayedHost(open_error=number))
    assert fact.state == UNKNOWN and errno.errorcode[number] in fact.evidence


def test_a_rung_tells_what_it_lacks(machine: Machine) -> None:
    """All ASIDs of SEV-ES are taken: the rung works all the same, and says so; plain SEV has nothing to say."""
    files = {"/dev/kvm": "", "/dev/sev": "", "/proc/cpuinfo": AMD, CAPACITY: "sev 10\nsev_es 5\n", CURRENT: "sev_es 5\n"}
    found = doctor.examine(machine(files, sev_host()))
    assert "but SEV-ES guests at once: " in found.rung("sev-es").reason
    assert "guests at once" not in found.rung("sev").reason


def hint(ioctl: str, code: int, argument: object = None) -> str:
    return errors.ioctl_error(named(ioctl, "system" if ioctl == "KVM_CREATE_VM" else "vm"), code, argument).hint  # type: ignore[arg-type]


def command_hint(command: str, code: int) -> str:
    return errors.command_error(named("KVM_MEMORY_ENCRYPT_OP", "vm"), command, code, {}, None).hint


def test_doctor_and_exceptions_say_the_same(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the doctor advises about a host is in the hint of the call that fails on that host, word for word."""
    from vmm import doctor_machine

    monkeypatch.setattr(doctor_machine, "_has_capability", lambda _number: False)
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _which: (65536, 65536))
    found = doctor.examine(machine({"/dev/kvm": "", CAPACITY: "sev 1\nsev_es 1\n", CURRENT: "sev 1\nsev_es 1\n"}, PlayedHost()))
    said = {fact.name: fact.remedy for fact in found.facts}
    assert said["type-sev"] in hint("KVM_CREATE_VM", errno.EINVAL, 2)
    assert said["type-sev-es"] in hint("KVM_CREATE_VM", errno.EINVAL, 3)
    assert said["type-sw-protected"] in hint("KVM_CREATE_VM", errno.EINVAL, 1)
    assert said["encrypt-op"] in command_hint("KVM_SEV_LAUNCH_FINISH", errno.ENOTTY)
    assert said["memory-attributes"] in hint("KVM_SET_MEMORY_ATTRIBUTES", errno.ENOTTY, structs.kvm_memory_attributes())
    assert said["memlock"] in command_hint("KVM_SEV_LAUNCH_UPDATE_DATA", errno.ENOMEM)
    assert said["memlock"] in hint("KVM_MEMORY_ENCRYPT_REG_REGION", errno.ENOMEM, structs.kvm_enc_region())
    assert said["sev-asids"] in command_hint("KVM_SEV_INIT", errno.EBUSY)
    assert said["sev-es-asids"] in command_hint("KVM_SEV_ES_INIT", errno.EBUSY)
    assert said["dev-sev"] == errors.open_error("/dev/sev", errno.ENOENT).hint


def test_a_node_that_refuses(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor knows the node's group and mode; the exception assumes the usual ones; the words are the same function's."""
    from vmm import doctor_machine

    def denied(*_args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    where = machine({"/dev/kvm": ""})
    where.path("/dev/kvm").chmod(0o660)
    monkeypatch.setattr(doctor_machine, "_group", lambda _gid: "kvm")
    monkeypatch.setattr(doctor_machine, "os", types.SimpleNamespace(**{**vars(os), "open": denied}))
    remedy = doctor_machine.device(where, "/dev/kvm").remedy
    assert remedy in (open_device("/dev/kvm"), open_device("/dev/kvm", group_may=False))
    assert errors.open_error("/dev/kvm", errno.EACCES).hint == open_device("/dev/kvm")
