"""The time-stamp counter: RDTSC and RDTSCP show what the MSR shows, and CR4.TSD keeps user code from them."""

from __future__ import annotations

from typing import Any

import pytest

from kvmapi.exits import Hlt
from tests.conformance.rows import feature
from tests.conformance.snippets import LongGuest, code

TSC, TSC_AUX = 0x10, 0xC0000103
READ = code("0f3148c1 e2204809 c24889d3", "rdtsc; shl rdx, 32; or rdx, rax; mov rbx, rdx")
READ_MSR = code("b9100000 000f3248 c1e22048 09c24889 d6", "mov ecx, 0x10; rdmsr; shl rdx, 32; or rdx, rax; mov rsi, rdx")


def test_three_readings_in_order(any_host: Any) -> None:
    with LongGuest(any_host, READ + READ_MSR + code("0f31f4", "rdtsc; hlt")) as guest:
        if feature(guest, "hardware virtualization") and not feature(guest, "an exact CPU"):
            pytest.skip("the lab's counter reads 0")
        assert guest.run() == Hlt()
        regs = guest.regs()
        assert 0 < regs.rbx <= regs.rsi <= (regs.rdx << 32 | regs.rax)


def test_what_is_written_is_where_it_goes_on(any_host: Any) -> None:
    with LongGuest(any_host, READ + b"\xf4") as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: the TSC is the machine's")
        guest.vcpu.set_msrs({TSC: 1 << 50})
        assert guest.run() == Hlt() and 1 << 50 <= guest.regs().rbx < 1 << 51


def test_rdtscp(any_host: Any) -> None:
    with LongGuest(any_host, code("0f01f9f4", "rdtscp; hlt")) as guest:
        if not feature(guest, "hardware virtualization"):
            pytest.skip("paravirtual: its emulator has no RDTSCP")
        guest.vcpu.set_msrs({TSC_AUX: 0x1234})
        assert guest.run() == Hlt() and guest.regs().rcx == 0x1234
