"""The GHCB's MSR protocol, and which page the MSR names. Source: sev_handle_vmgexit_msr_protocol, arch/x86/kvm/svm/sev.c, 7.3."""

from __future__ import annotations

from typing import Any

import pytest

from kvmapi.abi import ghcb as abi
from kvmapi.abi import kvm
from kvmapi.exits import ApResetHold, Hlt, SystemEvent
from kvmapi.model.host import ModelHost
from kvmapi.model.platform import C_BIT
from tests.conformance.snippets import code
from tests.model.es_code import GHCB_AT, PRIVATE_END, SHARED, Caller, EsCode
from tests.model.es_guest import PLAIN, SEV_ES

pytestmark = pytest.mark.model
READ = code(
    "b9300101c0 0f32 49be0010064000000000 418906 41895604 f4",
    "mov ecx, 0xc0010130; rdmsr; movabs r14, 0x40061000; mov [r14], eax; mov [r14+4], edx; hlt",
)


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


@pytest.fixture
def guest(host: ModelHost) -> Any:
    with Caller(host) as guest:
        yield guest


def ask(guest: Caller, value: int) -> int:
    """The MSR after VMGEXIT with `value` in it, which nothing but the guest hears of."""
    assert guest.call(value) == Hlt()
    return guest.msr()


@pytest.mark.parametrize(("type", "asked", "version"), [(SEV_ES, 0, 2), (SEV_ES, 1, 1), (SEV_ES, 2, 2), (PLAIN, 0, 1)])
def test_versions_and_c_bit_stand_there_at_first(host: ModelHost, type: int, asked: int, version: int) -> None:
    expected = version << 48 | 1 << 32 | C_BIT << 24 | 1
    with EsCode(host, READ, type, version=asked) as guest:
        assert guest.run() == Hlt() and guest.words(0x61000) == (expected,)
    with Caller(host, type, version=asked) as caller:
        assert ask(caller, 0xABC000000002) == expected, "and can be asked for"


def test_cpuid_one_register_at_a_time(guest: Caller) -> None:
    for number, value in enumerate((0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D)):
        asked = 0x40000000 << 32 | number << 30 | 0x3FFFF000 | 4
        assert ask(guest, asked) == value << 32 | number << 30 | 0x3FFFF000 | 5


def test_hypervisor_features(guest: Caller) -> None:
    assert ask(guest, 0xFFFF000000000080) == 3 << 12 | 0x81


@pytest.mark.parametrize("value", [0xFFF, 0x003, 0x1005, 0x101, 0x016, 0x007, 0x123456789ABCDFFF], ids=hex)
def test_an_unknown_request_stays(guest: Caller, value: int) -> None:
    assert ask(guest, value) == value


@pytest.mark.parametrize("value", [0x100, 0x1234567890AF1100, 0x010, 0x5000012, 0x14], ids=hex)
def test_termination_and_what_only_snp_guests_may_ask(guest: Caller, value: int) -> None:
    exit_ = guest.call(value)
    assert isinstance(exit_, SystemEvent) and (exit_.type, exit_.data) == (kvm.KVM_SYSTEM_EVENT_SEV_TERM, (value,))
    assert guest.run() == Hlt() and guest.msr() == value


def test_reset_hold_without_an_apic_in_the_kernel(guest: Caller) -> None:
    assert guest.call(0x123006) == ApResetHold()
    assert guest.run() == Hlt() and guest.msr() == 7, "no startup IPI ended it"
    guest.fill(abi.SVM_VMGEXIT_AP_HLT_LOOP)
    assert guest.call() == ApResetHold()
    assert guest.run() == Hlt() and guest.answer() == (0, 0)


# ---- pages that cannot be a GHCB: KVM lets the guest go on as if it had not asked
@pytest.mark.parametrize("gpa", [0, 0x200000, 0xD0000000, 1 << 51 | GHCB_AT, 0xFFFFFFFFFFFFF000], ids=hex)
def test_no_page_no_answer(guest: Caller, gpa: int) -> None:
    guest.fill(abi.SVM_VMGEXIT_TERM_REQUEST)
    before = guest.get(0, 0x200000)[GHCB_AT : GHCB_AT + 4096]
    assert ask(guest, gpa) == gpa
    assert guest.get(GHCB_AT, 4096) == before


def test_a_page_that_is_read_only_is_none(guest: Caller) -> None:
    guest.vm.set_user_memory_region(0, 0, 0, guest.hva)
    guest.vm.set_user_memory_region(0, 0, SHARED, guest.hva)
    guest.vm.set_user_memory_region(1, SHARED, 0x10000, guest.hva + SHARED, 0)
    guest.fill(abi.SVM_VMGEXIT_HV_FEATURES, at=SHARED)
    assert ask(guest, SHARED) == SHARED
    assert guest.words(SHARED + 0x3A0) == (3,)


def test_a_private_page_is_ciphertext_to_kvm(guest: Caller) -> None:
    """Whatever is there is taken for a request, and the answer destroys what the guest had."""
    before = guest.get(PRIVATE_END - 0x1000, 0x1000)
    assert ask(guest, PRIVATE_END - 0x1000) == PRIVATE_END - 0x1000
    after = guest.get(PRIVATE_END - 0x1000, 0x1000)
    assert after[0x398:0x3A0] == (2).to_bytes(8, "little") and after[0x400:] == before[0x400:]
