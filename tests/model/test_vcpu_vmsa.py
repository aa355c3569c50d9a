"""The VMSA of a model vCPU: what LAUNCH_UPDATE_VMSA measures is what an owner predicts, and which vCPUs it does not take."""

from __future__ import annotations

import ctypes
import hashlib
import struct
from errno import EINVAL

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmapi.abi import kvm
from kvmapi.abi import vcpu as v
from kvmapi.errors import KvmError
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import Platform
from kvmapi.vmsa import build_vmsa, difference, fields, reset_registers, sregs_as_read
from tests.model.es_guest import BOTH, SEV_ES, EsGuest, measure, set_up

pytestmark = pytest.mark.model
LSTAR, PAT = 0xC0000082, 0x277
DEBUG_SWAP = 1 << 5


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


# ---- what is measured
@BOTH
def test_a_vcpu_that_nobody_touched(host: ModelHost, type: int) -> None:
    with EsGuest(host, type) as guest:
        page = guest.file().vmsa()
        assert difference(page, build_vmsa(*reset_registers(), init2=type == SEV_ES)) is None
        regs, sregs = reset_registers()
        assert bytes(guest.vcpu.get_regs()) == bytes(regs)
        shown, expected = guest.vcpu.get_sregs(), sregs_as_read(sregs)
        for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt", "gdt", "idt"):
            assert bytes(getattr(shown, name)) == bytes(getattr(expected, name)), name


@BOTH
def test_registers_that_were_set(host: ModelHost, type: int) -> None:
    with EsGuest(host, type) as guest:
        regs, sregs = set_up(guest)
        guest.vcpu.set_msrs({LSTAR: 0x1234000, PAT: 0x0606060606060606})
        guest.vcpu.set_xcrs(v.kvm_xcrs(nr_xcrs=1, xcrs=(v.kvm_xcr * 16)(v.kvm_xcr(value=3))))
        guest.vcpu.set_debugregs(v.kvm_debugregs(db=(0x1000, 0x2000, 0x3000, 0x4000), dr6=0xFFFF0FF1, dr7=0x400))
        xsave = guest.vcpu.get_xsave()
        struct.pack_into("<H", xsave, 0, 0x27F)
        ctypes.memset(ctypes.addressof(xsave) + 160, 0xAB, 256)
        ctypes.memset(ctypes.addressof(xsave) + 32, 0xCD, 10)
        struct.pack_into("<B", xsave, 4, 1)
        guest.vcpu.set_xsave(xsave)
        expected = build_vmsa(
            regs, sregs, bytes(xsave), init2=type == SEV_ES, xcr0=3, dr6=0xFFFF0FF1, msrs={LSTAR: 0x1234000, PAT: 0x0606060606060606}
        )
        assert difference(guest.file().vmsa(), expected) is None
        assert ("xmm7" in fields(expected)) == (type == SEV_ES)


def test_the_features_of_init2_are_in_it() -> None:
    with EsGuest(ModelHost(Platform(debug_swap=True)), features=DEBUG_SWAP) as guest:
        assert fields(guest.file().vmsa())["sev_features"] == DEBUG_SWAP
        assert difference(guest.file().vmsa(), build_vmsa(*reset_registers(), sev_features=DEBUG_SWAP)) is None


@BOTH
def test_several_vcpus_are_measured_in_the_order_of_creation(host: ModelHost, type: int) -> None:
    with EsGuest(host, type, vcpus=0) as guest:
        for number in (3, 0, 7):
            guest.vcpus.append(guest.vm.create_vcpu(number))
            guest.vcpus[-1].set_cpuid2(guest.system.supported_cpuid())
        pages = []
        for at in range(3):
            regs, sregs = set_up(guest, at, rip=0x100000 + 0x1000 * at)
            pages.append(build_vmsa(regs, sregs, init2=type == SEV_ES))
        measure(guest.launch())
        assert guest.launch_digest() == hashlib.sha256(b"".join(pages)).digest()


WORDS = st.integers(0, (1 << 64) - 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(WORDS, min_size=17, max_size=17),
    st.lists(
        st.tuples(WORDS, st.integers(0, (1 << 32) - 1), st.integers(0, 0xFFFF), st.integers(0, 15), st.integers(0, 0x1FF)),
        min_size=8,
        max_size=8,
    ),
    st.binary(min_size=416, max_size=416),
    st.integers(0, 3),
)
def test_any_state_is_predicted(words: list[int], segments: list[tuple[int, int, int, int, int]], image: bytes, components: int) -> None:
    """Whatever the ioctls took is in the page as `build_vmsa` says."""
    with EsGuest(ModelHost()) as guest:
        regs = v.kvm_regs(**dict(zip(v.GENERAL_REGISTERS, words)), rflags=0x246)
        sregs = guest.vcpu.get_sregs()
        for name, (base, limit, selector, kind, bits) in zip(("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"), segments):
            flags = {key: bits >> at & 1 for at, key in enumerate(("present", "db", "s", "l", "g", "avl", "unusable"))}
            flags["l"] = 0 if name == "cs" else flags["l"]  # refused outside long mode
            setattr(sregs, name, v.kvm_segment(base=base, limit=limit, selector=selector, type=kind, dpl=bits >> 7, **flags))
        guest.vcpu.set_sregs(sregs)
        guest.vcpu.set_regs(regs)
        xsave = v.kvm_xsave()
        ctypes.memmove(ctypes.addressof(xsave), image, len(image))
        struct.pack_into("<B", xsave, 5, 0)  # reserved
        struct.pack_into("<II", xsave, 24, 0x1F80, 0xFFFF)
        struct.pack_into("<Q", xsave, 512, components)
        for number in range(8):
            ctypes.memset(ctypes.addressof(xsave) + 42 + 16 * number, 0, 6)
        guest.vcpu.set_xsave(xsave)
        assert difference(guest.file().vmsa(), build_vmsa(regs, sregs, bytes(xsave))) is None


# ---- what is refused at the launch
@BOTH
@pytest.mark.parametrize("how", ["stepped", "enabled only", "breakpoint", "reserved bits of DR7"])
def test_a_debugged_vcpu_is_not_launched(host: ModelHost, type: int, how: str) -> None:
    with EsGuest(host, type, vcpus=2) as guest:
        second = guest.vcpus[1]
        if how == "stepped":
            second.set_guest_debug(kvm.KVM_GUESTDBG_ENABLE | kvm.KVM_GUESTDBG_SINGLESTEP)
        elif how == "enabled only":
            second.set_guest_debug(kvm.KVM_GUESTDBG_ENABLE)
        else:
            second.set_debugregs(v.kvm_debugregs(dr6=0xFFFF0FF0, dr7=0x401 if how == "breakpoint" else 0x1400))
        assert guest.file(1).debugged and not guest.file(0).debugged
        with pytest.raises(KvmError) as failure:
            guest.launch()
        assert failure.value.errno == EINVAL
        assert guest.file(0).protected and not guest.file(1).protected  # KVM goes from one to the next
        second.set_guest_debug(0)
        assert second.get_regs().rip == 0xFFF0


@BOTH
def test_a_vcpu_is_launched_once(host: ModelHost, type: int) -> None:
    with EsGuest(host, type) as guest:
        page = guest.file().vmsa()
        guest.launch()
        with pytest.raises(KvmError) as failure:
            guest.launch()
        assert failure.value.errno == EINVAL
        measure(guest)
        assert guest.launch_digest() == hashlib.sha256(page).digest()
