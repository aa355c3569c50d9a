"""Guests whose GHCBs lie: whatever is in the page and in the MSR, KVM_RUN comes back with an exit or an errno that KVM has, the
guest goes on, and nothing grows.
"""

from __future__ import annotations

import random
import struct
import threading
import time
import tracemalloc
from errno import EFAULT, EINTR, EINVAL
from typing import Any

import pytest

from kvmapi.abi import caps, ioctls, kvm
from kvmapi.abi import ghcb as abi
from kvmapi.exits import Hlt, Io
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import PAGE, code, protect
from tests.model.es_code import CELL, GHCB_AT, PRIVATE_END, SHARED, Caller, EsCode
from tests.model.es_guest import BOTH

pytestmark = pytest.mark.model
EXITS = frozenset(
    (
        kvm.KVM_EXIT_UNKNOWN, kvm.KVM_EXIT_IO, kvm.KVM_EXIT_MMIO, kvm.KVM_EXIT_HLT, kvm.KVM_EXIT_HYPERCALL, kvm.KVM_EXIT_SYSTEM_EVENT,
        kvm.KVM_EXIT_X86_RDMSR, kvm.KVM_EXIT_X86_WRMSR, kvm.KVM_EXIT_AP_RESET_HOLD, kvm.KVM_EXIT_INTERNAL_ERROR,
    )
)  # fmt: skip
CODES = [value for name, value in vars(abi).items() if name.startswith(("SVM_EXIT_", "SVM_VMGEXIT_")) and isinstance(value, int)]
MSRS = [value for name, value in vars(abi).items() if name.startswith("GHCB_MSR_") and name.endswith("_REQ")]
ADDRESSES = [
    0,
    GHCB_AT,
    GHCB_AT + 0x800,
    GHCB_AT + 0xFEF,
    SHARED,
    PRIVATE_END,
    0x1FFFFF,
    0x200000,
    0xD0000000,
    0xFEE00000,
    1 << 51,
    (1 << 64) - 1,
]
FIELDS = ("rax", "rbx", "rcx", "rdx", "rsi", "cpl", "xcr0", "xss", "sw_exit_info_1", "sw_exit_info_2", "sw_scratch")
KNOWN_MSRS = [0x10, 0x1B, 0x277, 0xC0000080, 0xC0000103, 0xC0010130, 0xC0010131, 0x6E0, 0x803]


@pytest.fixture
def host() -> ModelHost:
    return ModelHost()


def number(chance: random.Random) -> int:
    """One that is interesting more often than not."""
    kind = chance.randrange(6)
    if kind == 0:
        return chance.choice(ADDRESSES) + chance.choice((0, 0, 1, -1, 4095)) & (1 << 64) - 1
    if kind == 1:
        return chance.getrandbits(64)
    if kind == 2:
        return chance.choice(KNOWN_MSRS)
    if kind == 3:
        return 1 << chance.randrange(64)
    return chance.randrange(32) if kind == 4 else chance.getrandbits(32)


def page_of_lies(chance: random.Random) -> bytes:
    """A GHCB that is mostly valid, so that most of it is believed."""
    page = abi.ghcb.from_buffer_copy(chance.randbytes(4096) if chance.random() < 0.2 else bytes(4096))
    page.save.sw_exit_code = chance.choice(CODES) if chance.random() < 0.9 else number(chance)
    for name in FIELDS:
        setattr(page.save, name, number(chance))
    if chance.random() < 0.5:
        page.save.sw_scratch = chance.choice(ADDRESSES)
    if chance.random() < 0.5:
        almost_right(page, chance)
    if page.save.sw_scratch < PRIVATE_END:  # its own code: it may do that to itself, and the test could not go on
        page.save.sw_scratch += PRIVATE_END
    page.save.valid_bitmap[:] = b"\xff" * 16 if chance.random() < 0.8 else chance.randbytes(16)
    page.ghcb_usage = 0 if chance.random() < 0.9 else number(chance) & 0xFFFFFFFF
    return bytes(page)


def almost_right(page: abi.ghcb, chance: random.Random) -> None:
    """A request that gets far."""
    save = page.save
    save.sw_exit_code = chance.choice((abi.SVM_EXIT_IOIO, abi.SVM_EXIT_VMMCALL, abi.SVM_VMGEXIT_MMIO_READ, abi.SVM_VMGEXIT_MMIO_WRITE))
    save.sw_exit_info_2 = chance.choice((0, 1, 7, 8, 9, 2032, 4096, 0x10000, 0x10001))
    if save.sw_exit_code == abi.SVM_EXIT_IOIO:
        save.sw_exit_info_1 = chance.getrandbits(28)
    if save.sw_exit_code == abi.SVM_EXIT_VMMCALL:
        save.rax, save.cpl, save.rbx = kvm.KVM_HC_MAP_GPA_RANGE, chance.choice((0, 3)), chance.choice(ADDRESSES)


def answer(guest: Caller, chance: random.Random) -> None:
    """User space answers with anything."""
    at = chance.randrange(32, 120)
    guest.vcpu.run_map[at : at + 8] = chance.randbytes(8)
    guest.vcpu.run_map[4096:4112] = chance.randbytes(16)


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_lies_in_every_field(host: ModelHost, type: int, seed: int) -> None:
    chance = random.Random(seed)
    with Caller(host, type) as guest, Caller(host, type) as bystander:
        guest.vm.enable_cap(caps.KVM_CAP_X86_USER_SPACE_MSR, 7)
        guest.vm.enable_cap(caps.KVM_CAP_EXIT_HYPERCALL, 1 << kvm.KVM_HC_MAP_GPA_RANGE)
        seen: set[int] = set()
        for _ in range(500):
            guest.put(GHCB_AT, page_of_lies(chance))
            msr = GHCB_AT if chance.random() < 0.9 else chance.choice([*MSRS, *ADDRESSES]) | chance.getrandbits(32) << 12
            if PRIVATE_END > msr >= 0x1000 and not msr & 0xFFF:
                continue  # its own code again
            guest.put(CELL, struct.pack("<QQ", msr & (1 << 64) - 1, 0))
            for _ in range(0x10000 // 8 + 1):  # MMIO of 64 KiB
                result = guest.vcpu.ioctl_raw(ioctls.KVM_RUN)
                reason = guest.vcpu.kvm_run.exit_reason
                seen.add(reason)
                assert result in (0, -EINVAL, -EFAULT), result
                assert reason in EXITS, reason
                if result == 0 and reason == kvm.KVM_EXIT_HLT:
                    break
                answer(guest, chance)
            else:
                raise AssertionError("it never ends")
        assert len(seen) >= 8, f"only exits {seen}"
        assert bystander.ask(abi.SVM_EXIT_CPUID, rax=0x40000000, rcx=0) == (0, 0), "another VM of the process"


def test_a_page_that_the_vmm_took_away(host: ModelHost) -> None:
    with Caller(host) as guest:
        guest.vm.set_user_memory_region(1, 0x200000, PAGE, guest.hva + SHARED)
        protect(guest.hva + SHARED, PAGE, 0)
        assert guest.call(0x200000) == Hlt() and guest.msr() == 0x200000, "no answer, and no harm"
        protect(guest.hva + SHARED, PAGE, 3)


def test_a_page_that_changes_its_place_between_exit_and_entry(host: ModelHost) -> None:
    with Caller(host) as guest:
        guest.fill(abi.SVM_EXIT_IOIO, 0x60 << 16 | 4 << 4 | 1)
        assert isinstance(guest.call(), Io)
        guest.vm.set_user_memory_region(0, 0, 0, guest.hva)
        guest.vm.set_user_memory_region(0, 0, GHCB_AT, guest.hva)
        guest.vm.set_user_memory_region(1, GHCB_AT, 0x40000, guest.hva + 0x100000)
        before = guest.get(GHCB_AT, PAGE)
        assert guest.run() == Hlt()
        assert guest.get(GHCB_AT, PAGE) == before and guest.get(0x100000 + 0x3F0, 16) != bytes(16), "the answer goes where the page is now"


def test_a_guest_that_never_stops_asking_can_be_stopped(host: ModelHost) -> None:
    """VMGEXITs that KVM answers itself: the VMM gets its vCPU back, and the process does not grow."""
    storm = code("0f30 f30f01d9 ebfa", "wrmsr; 0: .byte 0xf3; vmmcall; jmp 0b")
    with EsCode(host, storm, registers={"rcx": abi.MSR_AMD64_SEV_ES_GHCB, "rax": GHCB_AT}) as guest:
        peak = []
        for _ in range(3):
            tracemalloc.start()
            timer = threading.Timer(0.2, guest.vcpu.request_exit)
            timer.start()
            began = time.monotonic()
            assert guest.vcpu.ioctl_raw(ioctls.KVM_RUN) == -EINTR
            assert time.monotonic() - began < 2
            timer.join()
            guest.vcpu.kvm_run.immediate_exit = 0
            peak.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert max(peak) < 4 << 20, peak


def test_a_handler_that_raises_vc_itself(host: ModelHost) -> None:
    """The stack runs down over its code, or the VMM stops it: never a hang."""

    class Again(EsCode):
        def before_launch(self) -> None:
            self.set_gate(29, 0x10000)

    with Again(host, code("0fa2", "cpuid")) as guest:
        timer = threading.Timer(0.5, guest.vcpu.request_exit)
        timer.start()
        result: Any = guest.vcpu.ioctl_raw(ioctls.KVM_RUN)
        timer.cancel()
        assert result in (0, -EINTR) and guest.vcpu.kvm_run.exit_reason in (kvm.KVM_EXIT_SHUTDOWN, kvm.KVM_EXIT_INTR, kvm.KVM_EXIT_HLT)


def test_two_vcpus_and_one_page(host: ModelHost) -> None:
    """Each takes what it finds; neither the model nor the other is hurt."""
    with Caller(host, vcpus=2) as guest:
        guest.fill(abi.SVM_EXIT_CPUID, rax=1, rcx=0)
        guest.put(CELL, struct.pack("<QQ", GHCB_AT, 0))
        results: list[int] = []

        def many(number: int) -> None:
            for _ in range(200):
                results.append(guest.vcpus[number].ioctl_raw(ioctls.KVM_RUN))
                guest.put(GHCB_AT + 0x3F0, b"\xff" * 16)

        threads = [threading.Thread(target=many, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert set(results) <= {0, -EINVAL, -EFAULT} and len(results) == 400
