"""Private pages on paths that random steps rarely meet (test_secure_pages.py has the random ones)."""

from __future__ import annotations

import os
from errno import EFAULT
from typing import Any

import pytest

from kvmapi.abi import kvm
from kvmapi.exits import Hlt, MemoryFault
from tests.conformance.snippets import ALIAS, CODE, MIB, PAGE, PD_ALIAS, LongGuest, code
from tests.model.sev_guest import C_MASK, LOAD, STORE, SevGuest

pytestmark = pytest.mark.model
DEEP = int(os.environ.get("SEVMM_DEEP", "0"))
PRIVATE = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
HUGE = 2 * MIB


# ---- what random steps rarely meet


def quad(text: bytes) -> int:
    return int.from_bytes(text.ljust(8, b"\x90"), "little")


def test_a_frame_that_had_code_is_given_to_other_code(model_host: Any) -> None:
    """The same address is made to mean another page, after the first one's frame was given up: nothing translated from
    that frame may run.
    """
    text = code(
        "ffd389c6 498b1048 892f0f01 3bffd3f4",
        "call rbx; mov esi, eax; mov rdx, [r8]; mov [rdi], rbp; invlpg [rbx]; call rbx; hlt",
    )
    at, window = 0x18000, 8
    with SevGuest(model_host, LOAD + STORE + text, size=2 * HUGE) as guest:
        guest.store(at, quad(code("b8010000 00c3", "mov eax, 1; ret")))
        guest.store(HUGE + at, quad(code("b8020000 00c3", "mov eax, 2; ret")))
        guest.store(PD_ALIAS + 8 * window, 0x83 | C_MASK)
        guest.load(ALIAS + HUGE + at)  # the second page has no frame now
        assert guest.again(
            rip=CODE + len(LOAD + STORE), rbx=ALIAS + window * HUGE + at, rdi=PD_ALIAS + 8 * window, rbp=HUGE | 0x83 | C_MASK, r8=ALIAS + at
        ) == Hlt()  # fmt: skip
        assert (guest.regs().rsi, guest.regs().rax) == (1, 2)


def test_looking_for_the_end_of_an_instruction_gives_up_no_page(model_host: Any) -> None:
    """The page behind code is looked at when code is scanned. Through a mapping without the C-bit that must not be the
    look that takes a page's frame away from stores under way.
    """
    text = code("488903ff e6", "mov [rbx], rax; jmp rsi")
    page = 0x18000
    with SevGuest(model_host, LOAD + STORE + text) as guest:
        guest.store(page, quad(code("48890bf4", "mov [rbx], rcx; hlt")))
        assert guest.again(rip=CODE + len(LOAD + STORE), rbx=page + PAGE, rax=1, rcx=0x5EC2E7, rsi=ALIAS + page) == Hlt()
        assert guest.load(page + PAGE) == 0x5EC2E7


def test_code_in_shared_memory_is_not_the_hosts(model_host: Any) -> None:
    """What the VMM stores where the guest has code runs decrypted, as garbage: never as the VMM wrote it."""
    marker = code("b8adde00 00f4", "mov eax, 0xdead; hlt")
    with SevGuest(model_host, LOAD + STORE, private=MIB) as guest:
        guest.put(MIB, marker * 16)
        guest.regs(rip=ALIAS + MIB, rax=0)
        guest.vcpu.request_exit()
        guest.vcpu.run()
        guest.vcpu.request_exit(False)
        assert guest.get(MIB, len(marker)) == marker and guest.regs().rax != 0xDEAD
        assert guest.load(ALIAS + MIB) == quad(marker + marker[:2])


def test_private_execution_of_what_is_not_there(model_host: Any) -> None:
    """Code in a page that is private and has no file: the exit comes before anything is executed, from user memory too."""
    with LongGuest(model_host, b"\xf4", 1) as guest:
        guest.put(MIB, b"\xb8\x01\0\0\0\xf4")
        guest.vm.set_memory_attributes(MIB, PAGE, PRIVATE)
        guest.regs(rip=MIB, rax=0)
        assert guest.vcpu.run() == EFAULT and guest.vcpu.exit(EFAULT) == MemoryFault(PRIVATE, MIB, PAGE, EFAULT)
        assert (guest.regs().rip, guest.regs().rax) == (MIB, 0)


def test_private_tables_and_stack_that_are_not_there(model_host: Any) -> None:
    with LongGuest(model_host, code("50f4", "push rax; hlt"), 1) as guest:
        for at, place in ((0x2000, 0x2000), (0x1F000, 0x1F000)):
            guest.vm.set_memory_attributes(at, PAGE, PRIVATE)
            sregs = guest.vcpu.get_sregs()
            guest.vcpu.set_sregs(sregs)
            guest.regs(rip=CODE, rsp=0x20000)
            assert guest.vcpu.run() == EFAULT and guest.vcpu.exit(EFAULT) == MemoryFault(PRIVATE, place, PAGE, EFAULT)
            assert (guest.regs().rip, guest.regs().rsp) == (CODE, 0x20000)
            guest.vm.set_memory_attributes(at, PAGE, 0)
            assert guest.run() == Hlt() and guest.regs().rsp == 0x20000 - 8
