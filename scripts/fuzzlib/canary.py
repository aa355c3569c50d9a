"""Guests that live through all the fuzzing in the same process, and must go on giving the right answer.

Three kinds: a plain one that adds up its memory, one with private memory in a guest_memfd, and a SEV guest; the last
two count in their private memory, which nobody else may touch.
"""

from __future__ import annotations

from typing import Any

from kvmapi.abi import kvm
from kvmapi.exits import Hlt
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import DATA, MIB, LongGuest, code
from tests.model.sev_guest import SevGuest

_SUM = code(
    "31c0 be00000300 b900020000 480306 4883c608 e2f7 f4",
    "xor eax, eax; mov esi, 0x30000; mov ecx, 512; L: add rax, [rsi]; add rsi, 8; loop L; hlt",
)
_COUNT = code("488b03 48ffc0 488903 f4", "mov rax, [rbx]; inc rax; mov [rbx], rax; hlt")
_PRIVATE = 4 * MIB


class Canary:
    """All of them. `check` says what is wrong, or nothing."""

    def __init__(self, host: ModelHost) -> None:
        self._plain = LongGuest(host, _SUM)
        self._plain.put(DATA, b"".join((7 * number).to_bytes(8, "little") for number in range(512)))
        self._protected = LongGuest(host, _COUNT, kvm.KVM_X86_SW_PROTECTED_VM)
        vm = self._protected.vm
        self._file = vm.create_guest_memfd(MIB)
        self._protected.closing.append(self._file)
        vm.set_user_memory_region2(1, _PRIVATE, MIB, self._protected.hva, guest_memfd=self._file.fd)
        vm.set_memory_attributes(_PRIVATE, MIB, kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        self._sev = SevGuest(host, _COUNT)
        self._guests: list[LongGuest] = [self._plain, self._protected, self._sev]
        self.checks = 0

    def check(self) -> str:
        """Run each once."""
        self.checks += 1
        wanted = (7 * 511 * 256, self.checks, self.checks)
        places = (0, _PRIVATE, DATA)
        for guest, right, place in zip(self._guests, wanted, places):
            exit: Any = guest.again(rbx=place)
            if exit != Hlt() or guest.regs().rax != right:
                return f"canary {guest.vm.type}: {exit}, rax {guest.regs().rax:#x} instead of {right:#x} (check {self.checks})"
        return ""

    def close(self) -> None:
        for guest in self._guests:
            guest.__exit__()
