"""The commands of a launch through the ioctl: KVM's checks in their order, lengths, write-backs, and what stays done when it fails."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from errno import EBADF, EFAULT, EINVAL, ENOMEM, ENOTTY
from typing import Any

import pytest

from kvmapi.abi import kvm, psp, sev
from tests.conformance.snippets import PAGE
from tests.model.sev_vm import BAD, FIRMWARE, UNTOUCHED, Sev, buffer

pytestmark = pytest.mark.model


# ---- LAUNCH_START
def test_launch_start_arguments(vm: Sev) -> None:
    vm.to("init")
    start, data = sev.KVM_SEV_LAUNCH_START, sev.kvm_sev_launch_start
    assert vm.op(start, BAD) == (EFAULT, UNTOUCHED)
    for fd in (-1 & 0xFFFFFFFF, vm.vm.fd, vm.system.fd, 0, 0x7FFFFFFF):
        assert vm.op(start, data(), fd) == (EBADF, UNTOUCHED)
    assert vm.op(start, data(dh_uaddr=BAD, dh_len=2084)) == (EFAULT, UNTOUCHED)
    assert vm.op(start, data(dh_uaddr=vm.hva, dh_len=0x4001)) == (EINVAL, UNTOUCHED)
    assert vm.op(start, data(dh_uaddr=BAD, dh_len=0, session_uaddr=BAD, session_len=9), -1 & 0xFFFFFFFF) == (EINVAL, UNTOUCHED)
    assert vm.op(start, data(session_uaddr=vm.hva, session_len=0)) == (EINVAL, UNTOUCHED)
    assert vm.op(start, data(session_uaddr=BAD, session_len=9), -1 & 0xFFFFFFFF) == (EFAULT, UNTOUCHED), "blobs before the fd"
    assert vm.op(start, data(policy=0xFF << 16)) == FIRMWARE["POLICY_FAILURE"]
    assert vm.op(start, data(handle=77)) == FIRMWARE["INVALID_GUEST"], "keys shared with a guest that is not there"
    assert vm.guests == 0
    good = data(policy=1)
    assert vm.op(start, good) == (0, 0) and good.handle > 0 and vm.status() == (good.handle, 1, sev.SEV_STATE_LAUNCH_UPDATE)


def test_a_second_start_finds_the_asid_owned(vm: Sev) -> None:
    vm.to("started")
    before = vm.status()
    again = sev.kvm_sev_launch_start()
    assert vm.op(sev.KVM_SEV_LAUNCH_START, again) == FIRMWARE["ASID_OWNED"], "LAUNCH_START works, ACTIVATE does not"
    assert again.handle == 0 and vm.status() == before and vm.guests == 1


def test_a_policy_of_the_other_kind_has_the_wrong_asid(model_host: Any) -> None:
    for type, policy in ((2, sev.SEV_POLICY_ES), (3, 0)):
        with Sev(model_host, type) as vm:
            vm.to("init")
            assert vm.start(policy) == FIRMWARE["INVALID_ASID"] and vm.guests == 0
            assert vm.start() == (0, 0)


def test_a_start_that_cannot_tell_its_handle_is_undone(vm: Sev) -> None:
    vm.to("init")
    with buffer() as memory:
        memory.fill(bytes(sev.kvm_sev_launch_start()))
        memory.forbid(0, 1)
        assert vm.op(sev.KVM_SEV_LAUNCH_START, memory.address) == (EFAULT, 0)
    assert vm.guests == 0 and vm.finish() == (EBADF, UNTOUCHED)
    assert vm.start() == (0, 0), "the ASID is free"


# ---- LAUNCH_UPDATE_DATA
@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, PAGE, (0, 0)), (16, 16, (0, 0)), (PAGE - 16, 32, (0, 0)), (0, 0, (EINVAL, UNTOUCHED)),
        (8, 16, FIRMWARE["INVALID_ADDRESS"]), (0, 24, FIRMWARE["INVALID_LEN"]), (0, 8, FIRMWARE["INVALID_LEN"]),
    ],
)  # fmt: skip
def test_update_data(vm: Sev, offset: int, size: int, expected: tuple[int, int]) -> None:
    vm.to("started")
    before = vm.get(0, 2 * PAGE)
    assert vm.update(vm.hva + offset, size) == expected
    after = vm.get(0, 2 * PAGE)
    assert (after[offset : offset + 16] != before[offset : offset + 16]) == (expected[0] == 0)
    assert after[offset + size :] == before[offset + size :] and after[:offset] == before[:offset]


def test_update_data_of_memory_that_cannot_be_pinned(vm: Sev) -> None:
    vm.to("started")
    text = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "Py_Version")) & -PAGE  # read-only data of a library
    assert vm.update(text, PAGE) == (ENOMEM, UNTOUCHED)
    assert vm.update(0x10000, PAGE) == (ENOMEM, UNTOUCHED)
    assert vm.update((1 << 64) - PAGE, PAGE) == vm.update((1 << 64) - PAGE, 2 * PAGE) == (EINVAL, UNTOUCHED)
    assert vm.update(0xFFFF888000000000, PAGE) == (ENOMEM, UNTOUCHED)
    assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_DATA, BAD) == (EFAULT, UNTOUCHED)


@pytest.mark.parametrize("prot", [0, 1])
def test_a_hole_in_the_middle_changes_nothing(vm: Sev, prot: int) -> None:
    vm.to("started")
    with buffer(6) as memory:
        memory.fill(b"plain")
        memory.forbid(3, prot)
        assert vm.update(memory.address, memory.size) == (ENOMEM, UNTOUCHED)
        assert memory.memory[:5] == b"plain"


# ---- LAUNCH_MEASURE
def test_measure_arguments(vm: Sev) -> None:
    vm.to("started")
    ask, data = sev.KVM_SEV_LAUNCH_MEASURE, sev.kvm_sev_launch_measure
    query = data(BAD, 0, 7)
    assert vm.op(ask, query) == FIRMWARE["INVALID_LEN"] and (query.uaddr, query.len, query.pad0) == (BAD, 48, 7)
    short = data(vm.hva, 47)
    assert vm.op(ask, short) == FIRMWARE["INVALID_LEN"] and short.len == 47, "only a query is answered"
    nowhere = data(0, 0x5000)
    assert vm.op(ask, nowhere) == FIRMWARE["INVALID_LEN"] and nowhere.len == 0x5000, "no address, no room"
    assert vm.op(ask, data(vm.hva, 0x4001)) == (EINVAL, UNTOUCHED)
    assert vm.op(ask, BAD) == (EFAULT, UNTOUCHED) and vm.state() == sev.SEV_STATE_LAUNCH_UPDATE
    vm.put(0, b"\xff" * 0x4100)
    roomy = data(vm.hva, 0x4000)
    assert vm.op(ask, roomy) == (0, 0) and roomy.len == 48 and vm.state() == sev.SEV_STATE_LAUNCH_SECRET
    assert any(vm.get(0, 48)) and not any(vm.get(48, 0x4000 - 48)) and vm.get(0x4000, 16) == b"\xff" * 16, "the whole buffer is copied"
    again = data(vm.hva, 0)
    assert vm.op(ask, again) == FIRMWARE["INVALID_GUEST_STATE"] and again.len == 0, "a query is answered whatever the firmware says"


def test_a_measurement_that_cannot_be_copied_was_taken(vm: Sev) -> None:
    vm.to("started")
    lost = sev.kvm_sev_launch_measure(BAD, 64)
    assert vm.op(sev.KVM_SEV_LAUNCH_MEASURE, lost) == (EFAULT, 0)
    assert lost.len == 48 and vm.state() == sev.SEV_STATE_LAUNCH_SECRET


def test_a_query_that_cannot_be_answered(vm: Sev) -> None:
    vm.to("started")
    with buffer() as memory:
        memory.fill(bytes(sev.kvm_sev_launch_measure()))
        memory.forbid(0, 1)
        assert vm.op(sev.KVM_SEV_LAUNCH_MEASURE, memory.address) == (EFAULT, psp.SEV_RET_INVALID_LEN)


@pytest.mark.parametrize(("state", "allowed"), [("started", {"update", "measure"}), ("measured", {"finish"}), ("running", set())])
def test_wrong_states(model_host: Any, state: str, allowed: set[str]) -> None:
    for name in ("update", "measure", "finish"):
        with Sev(model_host) as vm:
            vm.to(state)
            before = vm.state()
            got = {"update": vm.update, "measure": vm.measure, "finish": vm.finish}[name]()
            assert got == ((0, 0) if name in allowed else FIRMWARE["INVALID_GUEST_STATE"])
            assert name in allowed or vm.state() == before


# ---- GUEST_STATUS and GET_ATTESTATION_REPORT
def test_guest_status_that_cannot_be_told(vm: Sev) -> None:
    vm.to("started")
    assert vm.op(sev.KVM_SEV_GUEST_STATUS, BAD) == (EFAULT, 0)


@pytest.fixture
def reporting(model_host: Any) -> Iterator[Sev]:
    """A started guest of a machine that will have to draw its keys."""
    with Sev(model_host) as made:
        made.to("started")
        yield made


def test_attestation_report_arguments(reporting: Sev) -> None:
    vm = reporting
    ask, data = sev.KVM_SEV_GET_ATTESTATION_REPORT, sev.kvm_sev_attestation_report
    early = data(uaddr=vm.hva, len=208)
    assert vm.op(ask, early) == FIRMWARE["INVALID_GUEST_STATE"] and early.len == 208
    assert vm.measure() == (0, 0)
    assert vm.op(ask, BAD) == (EFAULT, UNTOUCHED) and vm.op(ask, data(uaddr=vm.hva, len=0x4001)) == (EINVAL, UNTOUCHED)
    query = data(uaddr=BAD)
    assert vm.op(ask, query) == FIRMWARE["INVALID_LEN"] and query.len == 208
    assert vm.op(ask, data(uaddr=vm.hva, len=207)) == vm.op(ask, data(len=208)) == FIRMWARE["INVALID_LEN"]
    lost = data(uaddr=BAD, len=300)
    assert vm.op(ask, lost) == (EFAULT, 0) and lost.len == 208
    nonce = bytes(range(1, 17))
    good = data((ctypes.c_uint8 * 16)(*nonce), vm.hva, 256)
    vm.put(0, b"\xff" * 256)
    assert vm.op(ask, good) == (0, 0) and good.len == 208 and bytes(good.mnonce) == nonce
    assert vm.get(0, 16) == nonce and vm.get(208, 48) == bytes(48)


# ---- LAUNCH_UPDATE_VMSA
def test_vmsa_of_a_guest_without_es(vm: Sev) -> None:
    vm.to("started")
    assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (ENOTTY, UNTOUCHED)


def test_no_vcpus_no_firmware(model_host: Any) -> None:
    with Sev(model_host, 3) as vm:
        vm.to("started")
        assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (0, UNTOUCHED)


def vcpu_file(host: Any, vcpu: Any) -> Any:
    """The model's own side of a vCPU."""
    return host.file(vcpu.fd)


def test_vmsas_are_measured_in_the_order_of_creation(model_host: Any) -> None:
    with Sev(model_host, 3) as vm:
        vm.to("started")
        for number in (2, 0, 1):
            vcpu = vm.vm.create_vcpu(number)
            vm.vcpus.append(vcpu)
            registers = vcpu.get_regs()
            registers.rbx = 0x1000 + number
            vcpu.set_regs(registers)
        pages = [vcpu_file(model_host, vcpu).vmsa() for vcpu in vm.vcpus]
        assert len(set(pages)) == 3 and all(len(page) == PAGE for page in pages)
        assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (0, 0)
        assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (EINVAL, UNTOUCHED), "encrypted already"
        assert vm.measure() == (0, 0)
        report = sev.kvm_sev_attestation_report(uaddr=vm.hva, len=208)
        assert vm.op(sev.KVM_SEV_GET_ATTESTATION_REPORT, report) == (0, 0)
        assert vm.get(16, 32) == hashlib.sha256(b"".join(pages)).digest()


def test_vmsa_stops_at_the_vcpu_that_is_debugged(model_host: Any) -> None:
    with Sev(model_host, 3) as vm:
        vm.to("started")
        for _ in range(3):
            vm.add_vcpu()
        vm.vcpus[1].set_guest_debug(kvm.KVM_GUESTDBG_ENABLE)
        assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (EINVAL, 0), "the first vCPU's was done"
        states = [vcpu_file(model_host, vcpu).protected is not None for vcpu in vm.vcpus]
        assert states == [True, False, False]


def test_vmsa_needs_the_launch_and_its_fd(model_host: Any) -> None:
    with Sev(model_host, 3) as vm:
        vm.to("init")
        vm.add_vcpu()
        assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == (EBADF, UNTOUCHED)
        assert vm.start() == (0, 0) and vm.measure() == (0, 0)
        assert vm.op(sev.KVM_SEV_LAUNCH_UPDATE_VMSA) == FIRMWARE["INVALID_GUEST_STATE"]
        assert vcpu_file(model_host, vm.vcpu).protected is None
