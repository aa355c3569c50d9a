"""Descriptor tables, task states and stacks full of anything: every delivery ends in an architectural outcome or a typed
exit, and nothing raises or hangs.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmapi.exits import Unknown
from kvmapi.model.host import ModelHost
from tests.conformance.protected import TASK_TSS, ProtectedGuest
from tests.conformance.snippets import CODE, GDT, IDT, TSS, LongGuest, code

pytestmark = pytest.mark.model
TRIGGERS = [
    code("0f0b", "ud2", 32),
    code("cd21", "int 0x21", 32),
    code("cc", "int3", 32),
    code("31c9f7f1", "xor ecx, ecx; div ecx", 32),
    code("b9bc0a00 400f32", "mov ecx, 0x40000abc; rdmsr", 32),
    code("f4", "hlt", 32),
    code("b8580000 008ed8", "mov eax, 0x58; mov ds, ax", 32),
    code("9a000000 005800", "lcall 0x58, 0", 32),
    code("ea000000 006000", "ljmp 0x60, 0", 32),
    code("cf", "iretd", 32),
    code("f36c", "rep insb", 32),
    code("0f05", "syscall", 32),
    code("0f34", "sysenter", 32),
    code("6a68cb", "push 0x68; retf", 32),
    code("b8600000 000f00d8", "mov eax, 0x60; ltr ax", 32),
]
access = st.sampled_from([0x9B, 0x93, 0xFB, 0xF3, 0x8B, 0x89, 0x85, 0xE5, 0x8E, 0xEE, 0x86, 0x9F, 0x82, 0x81, 0x8C, 0xEC, 0x97, 0x1B, 0])
descriptor = st.one_of(
    st.binary(min_size=8, max_size=8),
    st.builds(
        lambda limit, base, kind, top: struct.pack("<HHBBBB", limit, base, 0, kind, top, 0),
        st.sampled_from([0, 0x67, 0xFFFF]),
        st.sampled_from([0, 0x7800, 0x8000, 0xFFFF]),
        access,
        st.sampled_from([0, 0x40, 0xC0, 0xCF, 0xAF, 0xEF]),
    ),
    st.builds(
        lambda entry, selector, kind: struct.pack("<HHHH", entry, selector, kind << 8, 0),
        st.sampled_from([0x9000, 0x9060, 0, 0xFFFF]),
        st.integers(0, 15).map(lambda n: n * 8) | st.integers(0, 0xFFFF),
        access,
    ),
)
tables = st.lists(descriptor, min_size=14, max_size=14).map(b"".join)
states = st.lists(st.one_of(st.integers(0, 0x70), st.sampled_from([0x20000, 0xFFFFFFFF, 2, 0x23002, 0x10000])), min_size=26, max_size=26)


def run(guest: Any) -> None:
    """A few runs, whatever they come to; a guest that spins is kicked."""
    timer = threading.Timer(0.03, guest.vcpu.request_exit)
    timer.start()
    try:
        for _ in range(3):
            assert not isinstance(guest.vcpu.exit(guest.vcpu.run()), Unknown)
    finally:
        timer.cancel()
        timer.join()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    trigger=st.sampled_from(TRIGGERS),
    user=st.booleans(),
    keep=st.integers(0, 13),
    gdt=tables,
    idt=tables,
    state=states,
    vectors=st.lists(st.integers(0, 0x22), min_size=14, max_size=14),
    esp=st.sampled_from([0x20000, 0, 1, 3, 7, 0xFFFFFFFF, 0x2FFFFE]),
)
def test_protected_mode(
    trigger: bytes, user: bool, keep: int, gdt: bytes, idt: bytes, state: list[int], vectors: list[int], esp: int
) -> None:
    with ProtectedGuest(ModelHost(), trigger, user=user) as guest:
        guest.put(GDT + 8 * keep, gdt[8 * keep :])
        for number, vector in enumerate(vectors):
            guest.put(IDT + 8 * vector, idt[8 * number : 8 * number + 8])
        for at in (TSS, TASK_TSS):
            guest.put(at, struct.pack("<26I", *state))
        guest.regs(rip=CODE, rsp=esp)
        run(guest)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    trigger=st.sampled_from(
        [
            code("0f0b", "ud2"),
            code("cd14", "int 0x14"),
            code("31c9f7f1", "xor ecx, ecx; div ecx"),
            code("48cf", "iretq"),
            code("8a042500 00e03f", "mov al, [0x3fe00000]"),
        ]
    ),
    gdt=tables,
    gates=st.lists(st.tuples(descriptor, st.sampled_from([0, 0xFFFFFFFF, 0x8000])), min_size=15, max_size=15),
    rsp=st.sampled_from([0x20000, 0, 1 << 47, (1 << 64) - 8, 0x3FE00010]),
    ist=st.integers(0, (1 << 64) - 1),
)
def test_long_mode(trigger: bytes, gdt: bytes, gates: list[tuple[bytes, int]], rsp: int, ist: int) -> None:
    with LongGuest(ModelHost(), trigger) as guest:
        guest.put(GDT + 16, gdt[:24])
        for vector, (low, high) in enumerate(gates):
            guest.put(IDT + 16 * vector, low + struct.pack("<II", high, 0))
        guest.put(TSS + 0x24, struct.pack("<Q", ist))
        guest.regs(rsp=rsp)
        run(guest)
