"""The ioctls of a vCPU after LAUNCH_UPDATE_VMSA that read and write its state.

Type 3 refuses what would show or change the guest's registers. The legacy type 0 (KVM_SEV_ES_INIT) answers, about a copy
that the guest does not have. Errnos and their order: arch/x86/kvm/x86.c, regs.c and svm/ of 7.3.
"""

from __future__ import annotations

import ctypes
import struct
from errno import EFAULT, EINVAL
from typing import Any

import pytest

from kvmapi.abi import kvm, sev
from kvmapi.abi import vcpu as v
from kvmapi.exits import Shutdown
from kvmapi.model import vmsa as model_vmsa
from kvmapi.model.cpu import fpu as model_fpu
from kvmapi.model.host import ModelHost
from kvmapi.vmsa import difference
from tests.model.es_guest import BOTH, PLAIN, SEV_ES, EsGuest, ioctls, measure, raw, set_up

pytestmark = pytest.mark.model
BAD = 8  # nothing is mapped there
EFER, STAR, LSTAR, PAT, TSC, GHCB, DEBUGCTL, LAST_BRANCH = 0xC0000080, 0xC0000081, 0xC0000082, 0x277, 0x10, 0xC0010130, 0x1D9, 0x1DB
ADDRESSES = (LSTAR, 0xC0000083, 0xC0000100, 0xC0000101, 0xC0000102)  # KVM checks that they are canonical


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


# ---- type 3
STRUCTS: list[tuple[str, Any, bool]] = [  # name, struct, does KVM read it before it refuses?
    ("KVM_GET_REGS", v.kvm_regs, False),
    ("KVM_SET_REGS", v.kvm_regs, True),
    ("KVM_GET_SREGS", v.kvm_sregs, False),
    ("KVM_SET_SREGS", v.kvm_sregs, True),
    ("KVM_GET_SREGS2", v.kvm_sregs2, False),
    ("KVM_SET_SREGS2", v.kvm_sregs2, False),
    ("KVM_GET_DEBUGREGS", v.kvm_debugregs, False),
    ("KVM_SET_DEBUGREGS", v.kvm_debugregs, True),
    ("KVM_GET_FPU", v.kvm_fpu, False),
    ("KVM_SET_FPU", v.kvm_fpu, True),
    ("KVM_GET_XSAVE", v.kvm_xsave, False),
    ("KVM_GET_XSAVE2", v.kvm_xsave, False),
    ("KVM_SET_XSAVE", v.kvm_xsave, True),
    ("KVM_GET_XCRS", v.kvm_xcrs, False),
    ("KVM_SET_XCRS", v.kvm_xcrs, True),
    ("KVM_SET_GUEST_DEBUG", v.kvm_guest_debug, True),
]


@pytest.mark.parametrize(("name", "struct_type", "reads"), STRUCTS, ids=[row[0] for row in STRUCTS])
def test_refused_on_type_3(host: ModelHost, name: str, struct_type: Any, reads: bool) -> None:
    with EsGuest(host) as guest:
        set_up(guest)
        before = guest.file().vmsa()
        request = getattr(ioctls, name)
        guest.launch()
        argument = struct_type()
        ctypes.memset(ctypes.addressof(argument), 0x5A, ctypes.sizeof(argument))
        assert raw(guest.vcpu, request, argument) == EINVAL
        assert bytes(argument) == b"\x5a" * ctypes.sizeof(argument), "nothing is written"
        assert raw(guest.vcpu, request, BAD) == (EFAULT if reads else EINVAL)
        assert model_vmsa.of(guest.file()) == before, "the guest's registers are as they were launched"


# ---- the legacy type
def test_the_legacy_type_shows_what_was_launched(host: ModelHost) -> None:
    with EsGuest(host, PLAIN) as guest:
        set_up(guest)
        before = [bytes(get()) for get in (guest.vcpu.get_regs, guest.vcpu.get_debugregs, guest.vcpu.get_xcrs)]
        guest.launch()
        assert before == [bytes(get()) for get in (guest.vcpu.get_regs, guest.vcpu.get_debugregs, guest.vcpu.get_xcrs)]


def test_the_legacy_type_takes_registers_that_the_guest_does_not_get(host: ModelHost) -> None:
    with EsGuest(host, PLAIN) as guest:
        set_up(guest)
        guest.launch()
        launched = model_vmsa.of(guest.file())
        vcpu = guest.vcpu
        vcpu.set_regs(v.kvm_regs(rax=0x77, rip=0x1234, rflags=2))
        vcpu.set_debugregs(v.kvm_debugregs(db=(0x1000, 0, 0, 0), dr6=0xFFFF0FF0, dr7=0x402))
        vcpu.set_xcrs(v.kvm_xcrs(nr_xcrs=1, xcrs=(v.kvm_xcr * 16)(v.kvm_xcr(value=3))))
        vcpu.set_msrs({LSTAR: 0x1234000})
        assert (vcpu.get_regs().rax, vcpu.get_regs().rip) == (0x77, 0x1234)
        assert (vcpu.get_debugregs().dr7, vcpu.get_xcrs().xcrs[0].value, vcpu.get_msrs([LSTAR])) == (0x402, 3, {LSTAR: 0x1234000})
        assert difference(model_vmsa.of(guest.file()), launched) is None
        assert not guest.file().cpu.code.breakpoints, "breakpoints of KVM's copy do not count in the guest"


@pytest.mark.parametrize("number", [1, 2], ids=["SREGS", "SREGS2"])
def test_of_system_registers_the_legacy_type_shows_what_kvm_needs(host: ModelHost, number: int) -> None:
    struct_type, get = (v.kvm_sregs, ioctls.KVM_GET_SREGS) if number == 1 else (v.kvm_sregs2, ioctls.KVM_GET_SREGS2)
    put = ioctls.KVM_SET_SREGS if number == 1 else ioctls.KVM_SET_SREGS2
    with EsGuest(host, PLAIN) as guest:
        _, given = set_up(guest)
        guest.launch()
        launched = model_vmsa.of(guest.file())
        expected = struct_type(cr0=given.cr0, cr4=given.cr4, efer=given.efer, apic_base=given.apic_base)
        found = struct_type()
        ctypes.memset(ctypes.addressof(found), 0x5A, ctypes.sizeof(found))
        assert raw(guest.vcpu, get, found) == 0 and bytes(found) == bytes(expected)
        found.cr3, found.cr8, found.cr4, found.efer, found.apic_base = 0x9000, 3, 0x20, 0xD00, 0xFEE01900
        assert raw(guest.vcpu, put, found) == 0
        expected.apic_base = 0xFEE01900
        assert raw(guest.vcpu, get, found) == 0 and bytes(found) == bytes(expected), "but for the APIC base all is dropped"
        assert difference(model_vmsa.of(guest.file()), launched) is None


def test_the_legacy_type_takes_a_waiting_interrupt(host: ModelHost) -> None:
    with EsGuest(host, PLAIN) as guest:
        set_up(guest)
        guest.launch()
        sregs = guest.vcpu.get_sregs()
        sregs.interrupt_bitmap[0] = 1 << 0x31
        guest.vcpu.set_sregs(sregs)
        assert guest.vcpu.get_vcpu_events().interrupt.nr == 0x31
        assert not any(guest.vcpu.get_sregs().interrupt_bitmap), "and shows none"


def test_the_legacy_type_still_checks_what_it_takes(host: ModelHost) -> None:
    with EsGuest(host, PLAIN) as guest:
        set_up(guest)
        guest.launch()
        launched, own = model_vmsa.of(guest.file()), bytes(guest.vcpu.get_sregs())
        wrong = guest.vcpu.get_sregs()
        wrong.efer &= ~0x400  # LMA does not fit
        assert raw(guest.vcpu, ioctls.KVM_SET_SREGS, wrong) == EINVAL
        assert raw(guest.vcpu, ioctls.KVM_SET_DEBUGREGS, v.kvm_debugregs(dr7=1 << 32)) == EINVAL
        assert raw(guest.vcpu, ioctls.KVM_SET_REGS, BAD) == raw(guest.vcpu, ioctls.KVM_GET_REGS, BAD) == EFAULT
        assert bytes(guest.vcpu.get_sregs()) == own and model_vmsa.of(guest.file()) == launched


def test_the_legacy_type_has_no_floating_point_to_show(host: ModelHost) -> None:
    with EsGuest(host, PLAIN) as guest:
        fpu = guest.vcpu.get_fpu()
        assert fpu.fcw == 0x37F
        ctypes.memset(ctypes.addressof(fpu.xmm), 0xAB, 256)
        guest.vcpu.set_fpu(fpu)
        guest.launch()
        assert not any(bytes(guest.vcpu.get_fpu())) and not any(bytes(guest.vcpu.get_xsave()))
        room = v.kvm_xsave()
        ctypes.memset(ctypes.addressof(room), 0x5A, ctypes.sizeof(room))
        assert raw(guest.vcpu, ioctls.KVM_GET_XSAVE2, room) == 0 and not any(bytes(room))
        for request, junk in ((ioctls.KVM_SET_FPU, v.kvm_fpu(fcw=1)), (ioctls.KVM_SET_XSAVE, v.kvm_xsave())):
            ctypes.memset(ctypes.addressof(junk), 0xFF, ctypes.sizeof(junk))
            assert raw(guest.vcpu, request, junk) == 0, "taken without a look"
            assert raw(guest.vcpu, request, BAD) == EFAULT
        started = v.kvm_fpu.from_buffer_copy(model_fpu.to_kvm_fpu(model_fpu.save(guest.file().cpu)))
        assert started.fcw == 0 and not any(bytes(started.xmm)), "the guest's is what its VMSA has: zeroes"


@BOTH
def test_no_debugging_afterwards(host: ModelHost, type: int) -> None:
    with EsGuest(host, type) as guest:
        guest.launch()
        for control in (0, kvm.KVM_GUESTDBG_ENABLE, kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_INJECT_DB):
            assert raw(guest.vcpu, ioctls.KVM_SET_GUEST_DEBUG, v.kvm_guest_debug(control=control)) == EINVAL
        assert raw(guest.vcpu, ioctls.KVM_SET_GUEST_DEBUG, BAD) == EFAULT
        assert not guest.file().debugged


# ---- MSRs
def msrs(guest: EsGuest, request: int, *entries: tuple[int, int]) -> tuple[int, list[int]]:
    """(how many KVM did, the values afterwards)."""
    buffer = ctypes.create_string_buffer(
        struct.pack("<II", len(entries), 0) + b"".join(struct.pack("<IIQ", n, 0, value) for n, value in entries)
    )
    done = guest.vcpu.ioctl_raw(request, ctypes.addressof(buffer))
    return done, [struct.unpack_from("<Q", buffer, 16 + 16 * at)[0] for at in range(len(entries))]


def get(guest: EsGuest, *numbers: int) -> tuple[int, list[int]]:
    return msrs(guest, ioctls.KVM_GET_MSRS, *((number, 0x5A) for number in numbers))


def put(guest: EsGuest, **entries: int) -> int:
    return msrs(guest, ioctls.KVM_SET_MSRS, *((globals()[name], value) for name, value in entries.items()))[0]


@BOTH
def test_msrs_until_kvm_lets_the_guest_have_them(host: ModelHost, type: int) -> None:
    """KVM opens the guest's way to its MSRs at the first KVM_RUN: until then it answers from its own copy."""
    with EsGuest(host, type) as guest:
        set_up(guest)
        guest.vcpu.set_msrs({LSTAR: 0x1234000})
        guest.launch()
        launched = model_vmsa.of(guest.file())
        assert get(guest, LSTAR, EFER, PAT) == (3, [0x1234000, 0xD01, 0x0007040600070406])
        assert put(guest, LSTAR=0x4321000, EFER=0xD00) == 2
        assert get(guest, LSTAR, EFER) == (2, [0x4321000, 0xD00])
        assert put(guest, LSTAR=1 << 47) == 0, "not canonical"
        assert difference(model_vmsa.of(guest.file()), launched) is None


@pytest.mark.parametrize(
    "number", [EFER, STAR, LSTAR, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101, 0xC0000102, 0x174, 0x175, 0x176, PAT, GHCB]
)
@BOTH
def test_msrs_that_are_the_guests(host: ModelHost, type: int, number: int) -> None:
    with EsGuest(host, type) as guest:
        set_up(guest)
        guest.launch()
        measure(guest)
        assert guest.run() == Shutdown()
        launched = model_vmsa.of(guest.file())
        if type == SEV_ES:
            done, values = get(guest, TSC, number, TSC)
            assert (done, *values[1:]) == (1, 0, 0x5A), "KVM stops there"
            assert msrs(guest, ioctls.KVM_SET_MSRS, (TSC, 5), (number, 8))[0] == 1
        else:
            done, values = get(guest, TSC, number, TSC)
            assert done == 3 and values[1] == 0
            assert msrs(guest, ioctls.KVM_SET_MSRS, (number, 0x1234), (TSC, 5))[0] == 2, "taken, and dropped"
            checked = number in ADDRESSES
            assert msrs(guest, ioctls.KVM_SET_MSRS, (number, 1 << 63), (TSC, 5))[0] == (0 if checked else 2), "not canonical"
        assert difference(model_vmsa.of(guest.file()), launched) is None


@pytest.mark.parametrize("number", [DEBUGCTL, LAST_BRANCH, LAST_BRANCH + 3])
@BOTH
def test_branch_records_are_the_guests_at_once(host: ModelHost, type: int, number: int) -> None:
    with EsGuest(host, type) as guest:
        guest.launch()
        assert get(guest, number, TSC)[0] == (0 if type == SEV_ES else 2) and get(guest, number)[1] == [0]


@BOTH
def test_msrs_that_stay_kvms(host: ModelHost, type: int) -> None:
    with EsGuest(host, type) as guest:
        set_up(guest)
        guest.launch()
        measure(guest)
        assert guest.run() == Shutdown()
        assert get(guest, TSC, 0x1B, 0x1A0, 0xC0000103)[0] == 4
        guest.vcpu.set_msrs({0xC0000103: 7})
        assert get(guest, 0xC0000103) == (1, [7])


# ---- KVM_TRANSLATE
def translate(guest: EsGuest, va: int) -> tuple[int, int, int, int, int]:
    room = ctypes.create_string_buffer(struct.pack("<Q16x", va), 24)
    assert raw(guest.vcpu, ioctls.KVM_TRANSLATE, room) == 0
    found: tuple[int, int, int, int, int] = struct.unpack("<QQBBB5x", room)
    return found


@BOTH
def test_translate(host: ModelHost, type: int) -> None:
    with EsGuest(host, type, vcpus=2) as guest:
        set_up(guest)
        guest.put(0x8000, struct.pack("<Q", 0x9003))
        guest.put(0x9000, struct.pack("<Q", 0x83))  # the first GiB
        guest.vm.sev_op(sev.KVM_SEV_LAUNCH_UPDATE_DATA, sev.kvm_sev_launch_update_data(guest.hva + 0x8000, 0x2000))
        assert translate(guest, 0x1234)[1:3] == (0x1234, 1), "the tables are good, as the guest sees them"
        guest.launch()
        assert translate(guest, 0x1234) == (0x1234, (1 << 64) - 1, 0, 1, 0), "KVM sees page tables encrypted"
        guest.vcpus.reverse()
        assert translate(guest, 0x1234) == (0x1234, 0x1234, 1, 1, 0), "this one has paging off"
        assert raw(guest.vcpu, ioctls.KVM_TRANSLATE, BAD) == EFAULT
