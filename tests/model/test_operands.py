"""Which instructions reach memory through the stack segment: kvmapi/model/cpu/operands.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapi.model.cpu import operands
from tests.conformance.snippets import code

pytestmark = pytest.mark.model
RSP = 0x1000
FAR = 0x800000

THROUGH = [
    code("50", "push rax"),
    code("4159", "pop r9"),
    code("6a05", "push 5"),
    code("68785634 12", "push 0x12345678"),
    code("9c", "pushfq"),
    code("9d", "popfq"),
    code("c3", "ret"),
    code("c20800", "ret 8"),
    code("c9", "leave"),
    code("c8080000", "enter 8, 0"),
    code("48cf", "iretq"),
    code("e85f0000 00", "call .+100"),
    code("0fa0", "push fs"),
    code("0fa9", "pop gs"),
    code("8a4500", "mov al, [rbp]"),
    code("48890424", "mov [rsp], rax"),
    code("488b44cc 10", "mov rax, [rsp + rcx*8 + 16]"),
    code("488b440d 00", "mov rax, [rbp + rcx]"),
    code("f0ff4508", "lock inc dword ptr [rbp + 8]"),
    code("0f100424", "movups xmm0, [rsp]"),
    code("0fb645ff", "movzx eax, byte ptr [rbp - 1]"),
    code("dd0424", "fld qword ptr [rsp]"),
    code("660f3800 4d00", "pshufb xmm1, [rbp]"),
    code("6644034d 01", "add r9w, [rbp + 1]"),
    code("48c74500 03000000", "mov qword ptr [rbp], 3"),
]
NOT = [
    code("8a00", "mov al, [rax]"),
    code("418a4500", "mov al, [r13]"),
    code("418a0424", "mov al, [r12]"),
    code("418a442d 00", "mov al, [r13 + rbp]"),
    code("648a4500", "mov al, fs:[rbp]"),
    code("658a0424", "mov al, gs:[rsp]"),
    code("8a050500 0000", "mov al, [rip + 5]"),
    code("488b046d 05000000", "mov rax, [rbp*2 + 5]"),
    code("89e8", "mov eax, ebp"),
    code("a4", "movsb"),
    code("a0887766 55443322 11", "movabs al, [0x1122334455667788]"),
    code("7400", "jz .+2"),
    code("0fa2", "cpuid"),
    code("0fcd", "bswap ebp"),
    code("ff30", "push [rax]"),
    code("ff10", "call [rax]"),
    code("8f00", "pop [rax]"),
    code("0f32", "rdmsr"),
    code("d7", "xlatb"),
]


@pytest.mark.parametrize("text", THROUGH, ids=lambda text: text.hex())
def test_through_the_stack(text: bytes) -> None:
    assert operands.through_stack(text, FAR, RSP)


@pytest.mark.parametrize("text", NOT, ids=lambda text: text.hex())
def test_not_through_the_stack(text: bytes) -> None:
    assert not operands.through_stack(text, FAR, RSP)


@pytest.mark.parametrize(
    "text", [code("ff30", "push [rax]"), code("ff10", "call [rax]"), code("8f00", "pop [rax]")], ids=lambda text: text.hex()
)
def test_two_operands_in_memory(text: bytes) -> None:
    """The address tells which of them was refused."""
    assert operands.through_stack(text, RSP - 8, RSP) and not operands.through_stack(text, FAR, RSP)


@given(st.binary(max_size=15))
def test_any_bytes(text: bytes) -> None:
    assert operands.through_stack(text, FAR, RSP) in (True, False)
