"""Private slots under SEV-ES guests: the same rule, asked for through the GHCB.

The guest's loop, each time the test calls it: VMGEXIT with what stands in the GHCB, then one store to an address that the test
chose, then HLT.
"""

from __future__ import annotations

import errno
import mmap
import struct
from typing import Any

import pytest

from kvmapi import dialects
from kvmapi.abi import caps, kvm
from kvmapi.abi import dialects as d
from kvmapi.abi import ghcb as abi
from kvmapi.exits import Hlt, Hypercall
from kvmapi.model.host import ModelHost
from tests.conformance.snippets import PAGE, address_of, code
from tests.model.es_code import CELL, GHCB_AT, Caller, EsCode
from tests.model.upm import AT, CLR, ENCRYPTED, MARK, PAT, host

pytestmark = pytest.mark.model
LOOP = code(
    "49be0010064000000000 b9300101c0 418b06 418b5604 0f30 f30f01d9 498b5e10 498b4618 488903 f4 ebe0",
    "movabs r14, 0x40061000; 0: mov ecx, 0xc0010130; mov eax, [r14]; mov edx, [r14+4]; wrmsr; vmgexit;"
    " mov rbx, [r14+16]; mov rax, [r14+24]; mov [rbx], rax; hlt; jmp 0b",
)
DONE = CELL + 0x800  # a store that nobody looks at


class EsUpm(Caller):
    """A launched SEV-ES guest with a test slot of two pages."""

    def __init__(self, machine: ModelHost) -> None:
        self.shared = mmap.mmap(-1, 2 * PAGE)
        self.memfd = dialects.PrivateMemfd.create(machine, 2 * PAGE)
        EsCode.__init__(self, machine, LOOP)
        self.closing += [self.memfd, self.shared]

    def before_launch(self) -> None:
        self.spoken = dialects.Vm(self.host, self.vm.fd, self.vm.type, 0, self.model.platform.dialect)  # the same fd
        self.spoken.set_private_region(10, AT, 2 * PAGE, address_of(self.shared), self.memfd.fd)
        self.spoken.enable_cap(caps.KVM_CAP_EXIT_HYPERCALL, 1 << kvm.KVM_HC_MAP_GPA_RANGE)

    def map_range(self, gpa: int, pages: int, attributes: int, store_at: int = 0x40000000 + DONE, value: int = 0) -> Any:
        """MAP_GPA_RANGE, then a store: the first exit."""
        self.fill(abi.SVM_EXIT_VMMCALL, rax=12, rbx=gpa, rcx=pages, rdx=attributes, cpl=0)
        self.put(CELL, struct.pack("<4Q", GHCB_AT, 0, store_at, value))
        return self.run()

    @property
    def result(self) -> int:
        """The hypercall's, as the guest finds it."""
        return int.from_bytes(int(self.ghcb.save.rax).to_bytes(8, "little"), "little", signed=True)

    def reason(self) -> tuple[int, int, int]:
        """The memory fault in kvm_run: exit reason, flags, GPA."""
        run = bytes(self.vcpu.run_map[:48])
        return int.from_bytes(run[8:12], "little"), int.from_bytes(run[32:40], "little"), int.from_bytes(run[40:48], "little")

    def secret(self) -> int:
        file: Any = self.model.file(self.memfd.fd)
        return int.from_bytes(file.memory()[:8], "little")


def test_marks_through_the_ghcb() -> None:
    with EsUpm(host("upm-v6")) as guest:
        guest.memfd.allocate(0, PAGE)
        assert guest.map_range(AT, 2, MARK, AT, PAT) == Hlt() and guest.result == 0
        assert guest.secret() not in (0, PAT) and guest.shared[:8] == bytes(8)  # private, and encrypted there
        guest.map_range(AT, 2, MARK, AT + PAGE, PAT)
        assert guest.reason() == (36, 1, AT + PAGE)
        guest.memfd.allocate(PAGE, PAGE)
        assert guest.run() == Hlt()
        guest.map_range(AT, 1, CLR, AT, PAT)
        assert guest.reason() == (36, 0, AT)
        guest.memfd.punch_hole(0, PAGE)
        assert guest.run() == Hlt() and guest.shared[:8] not in (bytes(8), PAT.to_bytes(8, "little"))


def test_conversions_through_the_ghcb() -> None:
    with EsUpm(host("upm-v7")) as guest:
        assert guest.map_range(0, 1, ENCRYPTED) == Hlt() and guest.result == -errno.EINVAL
        exit_ = guest.map_range(AT, 2, 0, AT, PAT)
        assert isinstance(exit_, Hypercall) and exit_.args[:3] == (AT, 2, 0)
        guest.vcpu.answer_hypercall(0)
        assert guest.run() == Hlt() and guest.result == 0
        assert guest.shared[:8] not in (bytes(8), PAT.to_bytes(8, "little")) and guest.secret() == 0
        guest.spoken.register_private(AT, PAGE)
        guest.map_range(AT, 1, CLR, AT, PAT)
        assert guest.reason() == (36, 0, AT)
        guest.spoken.unregister_private(AT, PAGE)
        assert guest.run() == Hlt()


def test_unmapped_private_memory() -> None:
    """The GHCB is in a slot without private half: shared from the start."""
    with EsUpm(host("upm-v6")) as guest:
        guest.spoken.enable_cap(d.KVM_CAP_UNMAPPED_PRIVATE_MEM)
        guest.memfd.allocate(0, 2 * PAGE)
        exit_ = guest.map_range(AT, 1, ENCRYPTED, AT, PAT)
        assert isinstance(exit_, Hypercall)
        guest.vcpu.answer_hypercall(0)
        assert guest.run() == Hlt() and guest.secret() not in (0, PAT)
        assert guest.map_range(AT, 1, CLR) == Hlt()
        guest.map_range(AT, 1, CLR, AT, PAT)
        assert guest.reason() == (36, 0, AT)
