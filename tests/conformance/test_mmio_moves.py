"""MOV at addresses without memory, in the forms that drivers use: what the VMM is asked, and what the register holds."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmapi.exits import Hlt, Mmio
from tests.conformance.snippets import MMIO, LongGuest, code

OLD, NEW = 0x1122334455667788, bytes(range(0xF1, 0xF9))


@pytest.mark.parametrize(("text", "offset", "data"), [
    (code("8843 05", "mov [rbx+5], al"), 5, b"\x88"),
    (code("8863 05", "mov [rbx+5], ah"), 5, b"\x77"),
    (code("4088 7305", "mov [rbx+5], sil"), 5, b"\x08"),
    (code("6689 0413", "mov [rbx+rdx], ax"), 0x10, b"\x88\x77"),
    (code("44890c93", "mov [rbx+rdx*4], r9d"), 0x40, b"\x44\x33\x22\x11"),
    (code("4889 83000100 00", "mov [rbx+0x100], rax"), 0x100, struct.pack("<Q", OLD)),
    (code("c7035634 1200", "mov dword ptr [rbx], 0x123456"), 0, struct.pack("<I", 0x123456)),
    (code("48c70380 ffffff", "mov qword ptr [rbx], -128"), 0, struct.pack("<q", -128)),
    (code("66c74302 cdab", "mov word ptr [rbx+2], 0xabcd"), 2, b"\xcd\xab"),
    (code("c60312", "mov byte ptr [rbx], 0x12"), 0, b"\x12"),
    (code("a2340000 d0000000 00", "movabs [0xd0000034], al"), 0x34, b"\x88"),
    (code("67 8903", "mov [ebx], eax"), 0, struct.pack("<I", 0x55667788)),
])  # fmt: skip
def test_stores(any_host: Any, text: bytes, offset: int, data: bytes) -> None:
    with LongGuest(any_host, text + b"\xf4") as guest:
        guest.regs(rax=OLD, rbx=MMIO, rdx=0x10, rsi=0x1108, r9=0x11223344)
        assert guest.run() == Mmio(MMIO + offset, len(data), True, data)
        assert guest.run() == Hlt() and guest.regs().rax == OLD


@pytest.mark.parametrize(("text", "offset", "size", "result"), [
    (code("8a4305", "mov al, [rbx+5]"), 5, 1, 0x11223344556677F1),
    (code("8a6305", "mov ah, [rbx+5]"), 5, 1, 0x112233445566F188),
    (code("668b03", "mov ax, [rbx]"), 0, 2, 0x112233445566F2F1),
    (code("8b4304", "mov eax, [rbx+4]"), 4, 4, 0xF4F3F2F1),
    (code("488b0413", "mov rax, [rbx+rdx]"), 0x10, 8, 0xF8F7F6F5F4F3F2F1),
    (code("a1b00000 d0000000 00", "movabs eax, [0xd00000b0]"), 0xB0, 4, 0xF4F3F2F1),
    (code("648b03", "mov eax, fs:[rbx]"), 0, 4, 0xF4F3F2F1),
])  # fmt: skip
def test_loads(any_host: Any, text: bytes, offset: int, size: int, result: int) -> None:
    with LongGuest(any_host, text + b"\xf4") as guest:
        guest.regs(rax=OLD, rbx=MMIO, rdx=0x10)
        asked = guest.run()
        assert asked == Mmio(MMIO + offset, size, False, b"") and isinstance(asked, Mmio)
        guest.vcpu.answer_mmio(asked, NEW[:size])
        assert guest.run() == Hlt() and guest.regs().rax == result
