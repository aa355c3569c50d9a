"""KVM_MEMORY_ENCRYPT_OP: KVM's checks in their order, the firmware's codes, and what is written back.

KVM's own failures are an errno and leave `error` as it was (UNTOUCHED); the firmware's are EIO with its code.
"""

from __future__ import annotations

from errno import EBADF, EFAULT, EINVAL, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import ioctls, sev
from kvmapi.errors import HostError, KvmError
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from kvmapi.sev import SevPlatform
from tests.conformance.snippets import Machine
from tests.model.sev_vm import BAD, FIRMWARE, UNTOUCHED, Buffer, Sev, buffer, sev_at_fd_zero

pytestmark = pytest.mark.model
DISPATCHED = (*range(10), 11, 12, 13, 15, 16, 17, 18, 20, 21, 22, 100, 101, 102, 103)
UNKNOWN = (10, 14, 19, 23, 24, 99, 104, 0xFFFFFFFF)


# ---- dispatch
def test_null_argument_asks_whether_sev_is_there(vm: Sev) -> None:
    assert vm.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, 0) == 0
    assert vm.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, BAD) == -EFAULT


@pytest.mark.parametrize("state", ["fresh", "init", "running"])
def test_unknown_ids(vm: Sev, state: str) -> None:
    vm.to(state)
    for number in UNKNOWN:
        assert vm.op(number) == (EINVAL, UNTOUCHED)


def raw(vm: Sev, memory: Buffer, number: int, data: int = 0) -> int:
    """The errno of a command whose struct stands in this memory."""
    command = sev.kvm_sev_cmd(id=number, pad0=7, data=data, error=UNTOUCHED, sev_fd=vm.device.fd)
    memory.fill(bytes(command))
    memory.forbid(0, 1)
    try:
        return -vm.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, memory.address)
    finally:
        memory.forbid(0, 3)
        assert memory.memory[: len(bytes(command))] == bytes(command), "what cannot be written is as it was"


def test_the_struct_is_written_back_by_whatever_was_dispatched(vm: Sev) -> None:
    """In read-only memory that is EFAULT, in place of the command's own outcome."""
    vm.to("init")
    with buffer() as memory:
        assert {number for number in range(110) if raw(vm, memory, number) == EFAULT} == set(DISPATCHED)
        assert {raw(vm, memory, number) for number in UNKNOWN} == {EINVAL}


def test_a_command_whose_struct_cannot_be_written_back_was_done(model_host: Any) -> None:
    with Sev(model_host) as vm, buffer() as memory:
        vm.to("started")
        assert raw(vm, memory, sev.KVM_SEV_LAUNCH_FINISH) == EFAULT and vm.state() == sev.SEV_STATE_LAUNCH_UPDATE
        assert vm.measure() == (0, 0)
        assert raw(vm, memory, sev.KVM_SEV_LAUNCH_FINISH) == EFAULT and vm.state() == sev.SEV_STATE_RUNNING


def test_snp_commands_on_other_guests(vm: Sev) -> None:
    for state in ("fresh", "init"):
        vm.to("init" if state == "init" else "fresh")
        assert [vm.op(number) for number in (100, 101, 102, 103)] == [(errno, UNTOUCHED) for errno in (ENOTTY, EINVAL, ENOTTY, EINVAL)]


def test_a_platform_without_sev() -> None:
    host = ModelHost(Platform(sev=False))
    with pytest.raises(HostError):
        SevPlatform(host)
    with Machine(host) as machine:
        assert machine.system.check_extension(235) == 0x3
        assert machine.system.ioctl_raw(ioctls.KVM_CREATE_VM, 2) == -EINVAL
        assert machine.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, 0) == -ENOTTY
        assert machine.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, BAD) == -ENOTTY
        leaf = next(e for e in machine.system.supported_cpuid() if e.function == 0x8000001F)
        assert (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) == (0, 0, 0, 0)


# ---- initialisation
@pytest.mark.parametrize(
    ("type", "number", "expected"),
    [
        (0, 0, 0), (0, 1, 0), (0, 22, EINVAL), (1, 0, EINVAL), (1, 1, EINVAL), (1, 22, EINVAL),
        (2, 0, EINVAL), (2, 1, EINVAL), (2, 22, 0), (3, 0, EINVAL), (3, 1, EINVAL), (3, 22, 0),
    ],
)  # fmt: skip
def test_init_wants_its_vm_type(model_host: Any, type: int, number: int, expected: int) -> None:
    with Sev(model_host, type) as vm:
        data = sev.kvm_sev_init() if number == 22 else None
        assert vm.op(number, data) == (expected, UNTOUCHED)


def test_without_sev_es(vm: Sev) -> None:
    host = ModelHost(Platform(es=False))
    with Sev(host, 0) as legacy, buffer() as memory:
        assert legacy.op(sev.KVM_SEV_ES_INIT) == (ENOTTY, UNTOUCHED)
        assert raw(legacy, memory, sev.KVM_SEV_ES_INIT) == ENOTTY, "refused before it is dispatched"
        assert legacy.system.ioctl_raw(ioctls.KVM_CREATE_VM, 3) == -EINVAL
    with Sev(host, 2) as other:
        assert other.op(sev.KVM_SEV_ES_INIT) == (ENOTTY, UNTOUCHED), "before the type is looked at"
    assert vm.op(sev.KVM_SEV_ES_INIT) == (EINVAL, UNTOUCHED)


INIT2 = [
    (2, "flags", sev.kvm_sev_init(flags=1), EINVAL),
    (2, "high flag", sev.kvm_sev_init(flags=1 << 31), EINVAL),
    (2, "features", sev.kvm_sev_init(vmsa_features=1 << 5), EINVAL),
    (2, "ghcb version", sev.kvm_sev_init(ghcb_version=1), EINVAL),
    (2, "ghcb version 2", sev.kvm_sev_init(ghcb_version=2), EINVAL),
    (2, "ghcb version too new", sev.kvm_sev_init(ghcb_version=3), EINVAL),
    (2, "bad pointer", BAD, EFAULT),
    (2, "null", 0, EFAULT),
    (3, "flags", sev.kvm_sev_init(flags=2), EINVAL),
    (3, "features", sev.kvm_sev_init(vmsa_features=1 << 9), EINVAL),
    (3, "ghcb version too new", sev.kvm_sev_init(ghcb_version=3), EINVAL),
]


@pytest.mark.parametrize(("type", "name", "data", "expected"), INIT2, ids=[f"{row[0]} {row[1]}" for row in INIT2])
def test_init2_arguments(model_host: Any, no_leaks: None, type: int, name: str, data: Any, expected: int) -> None:
    with Sev(model_host, type) as vm:
        assert vm.op(sev.KVM_SEV_INIT2, data) == (expected, UNTOUCHED)
        vm.to("init")
        assert vm.op(sev.KVM_SEV_INIT2, BAD) == (EINVAL, UNTOUCHED), "initialised already comes before the pointer"


@pytest.mark.parametrize("version", [0, 1, 2])
def test_init2_of_sev_es(model_host: Any, version: int) -> None:
    with Sev(model_host, 3) as vm:
        assert vm.op(sev.KVM_SEV_INIT2, sev.kvm_sev_init(ghcb_version=version)) == (0, UNTOUCHED)


def test_init2_takes_the_features_on_offer() -> None:
    for offered, expected in ((True, 0), (False, EINVAL)):
        host = ModelHost(Platform(debug_swap=offered))
        with Sev(host, 3) as vm:
            assert vm.system.device_attr(sev.KVM_X86_GRP_SEV, sev.KVM_X86_SEV_VMSA_FEATURES) == (1 << 5 if offered else 0)
            assert vm.op(sev.KVM_SEV_INIT2, sev.kvm_sev_init(vmsa_features=1 << 5))[0] == expected
        with Sev(host, 2) as vm:
            assert vm.op(sev.KVM_SEV_INIT2, sev.kvm_sev_init(vmsa_features=1 << 5))[0] == EINVAL, "SEV has none"


def test_init_after_vcpus(model_host: Any) -> None:
    with Sev(model_host) as vm:
        vm.add_vcpu()
        assert vm.op(sev.KVM_SEV_INIT2, BAD)[0] == EFAULT, "the pointer comes first"
        assert vm.op(sev.KVM_SEV_INIT2, sev.kvm_sev_init())[0] == EINVAL
    with Sev(model_host, 0) as vm:
        vm.add_vcpu()
        assert vm.op(sev.KVM_SEV_INIT) == vm.op(sev.KVM_SEV_ES_INIT) == (EINVAL, UNTOUCHED)


def test_run_needs_init2(vm: Sev) -> None:
    with pytest.raises(KvmError) as caught:
        vm.add_vcpu().run()
    assert caught.value.errno == EINVAL


@pytest.mark.parametrize("type", [0, 2])
@pytest.mark.parametrize("number", [n for n in DISPATCHED if n not in (0, 1, 22) and n < 100])
def test_commands_before_init(model_host: Any, type: int, number: int) -> None:
    with Sev(model_host, type) as vm:
        assert vm.op(number, BAD) == (EINVAL if number == sev.KVM_SEV_RECEIVE_UPDATE_DATA else ENOTTY, UNTOUCHED)


# ---- which fd
TAKES_NOTHING = (sev.KVM_SEV_LAUNCH_FINISH, sev.KVM_SEV_SEND_FINISH, sev.KVM_SEV_SEND_CANCEL, sev.KVM_SEV_RECEIVE_FINISH)


def test_before_the_start_fd_0_is_asked_about_handle_0(vm: Sev) -> None:
    vm.to("init")
    for number in TAKES_NOTHING:
        assert vm.op(number) == (EBADF, UNTOUCHED), "whatever the caller names"
    assert vm.op(sev.KVM_SEV_GUEST_STATUS, BAD) == (EBADF, UNTOUCHED)
    with sev_at_fd_zero(vm.host):
        for number in TAKES_NOTHING:
            assert vm.op(number, fd=-1 & 0xFFFFFFFF) == FIRMWARE["INVALID_GUEST"]
        assert vm.update() == FIRMWARE["INVALID_GUEST"]
    assert vm.finish() == (EBADF, UNTOUCHED)


def test_later_commands_use_the_fd_of_the_start(vm: Sev) -> None:
    vm.to("started")
    assert vm.update() == (0, 0)
    assert vm.op(sev.KVM_SEV_LAUNCH_FINISH, fd=-1 & 0xFFFFFFFF) == FIRMWARE["INVALID_GUEST_STATE"], "the caller's is not looked at"
    vm.device.close()
    assert vm.finish() == (EBADF, UNTOUCHED) and vm.update() == (EBADF, UNTOUCHED)
    assert vm.op(sev.KVM_SEV_GUEST_STATUS, BAD) == (EBADF, UNTOUCHED)
    with SevPlatform(vm.host) as again:
        assert again.fd >= 0 and vm.op(sev.KVM_SEV_LAUNCH_MEASURE, BAD) == (EFAULT, UNTOUCHED)
