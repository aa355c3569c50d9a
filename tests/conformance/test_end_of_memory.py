"""Code in the last bytes of memory: what lies before the end is executed; an instruction that is not there whole, or the
next one, ends the guest, because KVM does not fetch from MMIO.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvmapi.exits import Hlt, InternalError, Io
from tests.conformance.snippets import CODE, DATA, MIB, STACK, LongGuest, code

END = 2 * MIB


def start(guest: LongGuest, text: bytes) -> int:
    """Put the code at the end of memory and RIP on it."""
    guest.put(END - len(text), text)
    guest.regs(rip=END - len(text), rsp=STACK, rflags=2, rax=1, rbx=DATA, rdx=0x10)
    return END - len(text)


@pytest.mark.parametrize("before", [0, 1, 2, 20])
@pytest.mark.parametrize("cut", ["48", "4889", "e900", "b80102", "48b800000000000000"])
def test_an_instruction_that_ends_beyond(any_host: Any, before: int, cut: str) -> None:
    whole = code("88034883 c302", "mov [rbx], al; add rbx, 2") * before
    with LongGuest(any_host, b"") as guest:
        at = start(guest, whole + bytes.fromhex(cut))
        exit = guest.run()
        assert isinstance(exit, InternalError) and exit.suberror == 1
        assert guest.regs().rip == at + len(whole), "on the instruction that is cut"
        assert guest.get(DATA, 2 * before) == b"\x01\0" * before


@pytest.mark.parametrize("text", [code("90", "nop"), code("8803", "mov [rbx], al"), code("4889 03ffc0", "mov [rbx], rax; inc eax")])
def test_walking_off_the_end(any_host: Any, text: bytes) -> None:
    with LongGuest(any_host, b"") as guest:
        start(guest, text)
        exit = guest.run()
        assert isinstance(exit, InternalError) and exit.suberror == 1
        assert guest.regs().rip == END


def test_what_leaves_the_guest_before_the_end(any_host: Any) -> None:
    with LongGuest(any_host, b"") as guest:
        start(guest, code("fec0 ee", "inc al; out dx, al"))
        assert isinstance(guest.run(), Io)
    with LongGuest(any_host, b"") as guest:
        start(guest, code("90 f4", "nop; hlt"))
        assert guest.run() == Hlt()
    with LongGuest(any_host, code("f4", "hlt")) as guest:
        start(guest, b"\xe9" + (CODE - END).to_bytes(4, "little", signed=True))  # jmp CODE
        assert guest.run() == Hlt()
