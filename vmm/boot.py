"""What a guest finds when it starts: descriptor tables, page tables, boot info, first registers (docs/seams.md §4).

Everything is computed as bytes by GPA and as register values; nothing here touches guest memory or KVM, so the same pages can be written,
measured and tested.

    0x01000 GDT   0x02000 IDT   0x04000 boot info   0x05000 shared page   0x06000 secret page   0x08000.. page tables
    0x40000 + 8 KiB * vCPU stacks   0xC0000 + 128 * vCPU TSS   0x100000.. image   0x400000 + 4 KiB * vCPU GHCB   0x800000 test area
    0xD0000000 hole

Invariants: the identity map covers all memory and the hole, page 0 is absent; on a guest with a C-bit, every entry has it (tables are
encrypted like everything else) except the leaves of what is shared: the shared page, the GHCBs of SEV-ES, the test area at the start,
the hole. CR3 has no C-bit: page-table walks of a SEV guest are private whatever it says (AMD APM volume 2, 15.34.5), and kernel
selftests do the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmapi.abi.vcpu import kvm_regs, kvm_segment, kvm_sregs
    from vmm.image import Image, Segment

PAGE = 0x1000
LARGE = 0x200000
GDT, IDT, BOOT_INFO, SHARED_PAGE, SECRET_PAGE, TABLES = 0x1000, 0x2000, 0x4000, 0x5000, 0x6000, 0x8000
STACKS, STACK_SIZE = 0x40000, 0x2000
TSS, TSS_STRIDE, TSS_LIMIT = 0xC0000, 128, 0x67
GHCBS = 0x400000
"""Of an SEV-ES guest: one page for each vCPU, through which it talks to the host."""

TEST_AREA, TEST_SIZE = 0x800000, 0x800000
SMALL_PAGES_END = 0x1000000
"""Below this GPA the identity map uses 4 KiB pages, so that a guest can change the C-bit of one page."""

HOLE, HIGH = 0xD0000000, 0x100000000
LOW_MEMORY_MAX = 0xC0000000
"""Memory below the hole; the rest of a larger guest starts at 4 GiB."""

MAX_VCPUS = 64
MIN_MEMORY = 16 << 20
MAX_MEMORY = LOW_MEMORY_MAX + (((STACKS - TABLES) // PAGE - 14) << 30)
"""One page of tables maps 1 GiB, and the tables end where the stacks begin: 45 GiB."""

SECRET_MAGIC = b"SEVMMSEC"
MAX_SECRET = PAGE - 16
"""Bytes of a secret: the secret page holds magic and length before it."""

SEV_ES = 3
"""The VM type whose guests have GHCBs (KVM_X86_SEV_ES_VM)."""

MSR = 0x40000ABC
MAX_ARGUMENTS = 1023
FEATURE_HYPERCALL, FEATURE_MSR, FEATURE_IMPLICIT, FEATURE_MMIO = 1, 2, 4, 8

_ZEROES = memoryview(bytes(LARGE))
_TABLE, _LEAF, _LARGE_LEAF = 0x63, 0x63, 0xE3  # present, writable, accessed, dirty; bit 7: 2 MiB
_CODE64, _DATA = 0x00AF9B000000FFFF, 0x00CF93000000FFFF
_CR0, _CR4, _EFER = 0x80010033, 0x620, 0xD01


@dataclass(frozen=True)
class BootInfo:
    """The values of the boot info page; sizes in bytes, addresses are GPAs, `arguments` at most 1023 bytes."""

    vm_type: int
    c_mask: int
    memory_size: int
    vcpus: int
    features: int
    arguments: bytes = b""

    @property
    def ghcbs(self) -> range:
        """GPAs of the GHCB pages, one per vCPU; empty but for SEV-ES."""
        return ghcb_pages(self.vm_type, self.vcpus)

    def page(self) -> bytes:
        """The page as the guest reads it."""
        words = (self.vm_type, self.c_mask, self.memory_size, self.vcpus, TABLES, SHARED_PAGE, TEST_AREA, TEST_SIZE, HOLE, self.features)
        page = bytearray(PAGE)
        last = (MSR if self.features & FEATURE_MSR else 0, GHCBS if self.ghcbs else 0)
        struct.pack_into("<8s12Q", page, 0, b"SEVMMBI1", *words, *last)
        page[256 : 256 + len(self.arguments)] = self.arguments
        return bytes(page)


def ghcb_pages(vm_type: int, vcpus: int) -> range:
    """GPAs of the GHCB pages of a VM of this type; they are shared from the start and not measured."""
    return range(GHCBS, GHCBS + PAGE * vcpus, PAGE) if vm_type == SEV_ES else range(0)


def secret_page(secret: bytes | bytearray) -> bytearray:
    """What goes to the start of the secret page for `secret` (1 to `MAX_SECRET` bytes): magic, length, bytes, zeroes up to
    a multiple of 16, which is what the firmware takes. A bytearray, so that the caller can wipe it. Raises ValueError.
    """
    if not 1 <= len(secret) <= MAX_SECRET:
        raise ValueError(f"a secret has 1 to {MAX_SECRET} bytes, not {len(secret)}")
    page = bytearray(-(-(16 + len(secret)) // 16) * 16)
    struct.pack_into("<8sQ", page, 0, SECRET_MAGIC, len(secret))
    page[16 : 16 + len(secret)] = secret
    return page


def memory_layout(size: int) -> list[tuple[int, int]]:
    """`(gpa, size)` of the pieces of `size` bytes of guest memory: up to 3 GiB from 0, the rest from 4 GiB."""
    low = min(size, LOW_MEMORY_MAX)
    return [(0, low)] if size == low else [(0, low), (HIGH, size - low)]


def pages(info: BootInfo, symbols: Mapping[str, int]) -> dict[int, bytes]:
    """The pages the VMM makes up for the guest, by GPA; stacks are there as zeroes because a guest starts with them."""
    found: dict[int, bytes] = {}
    for gpa, data in (
        (GDT, gdt(info.vcpus)),
        (IDT, idt(symbols.get("vector_stubs"))),
        (BOOT_INFO, info.page()),
        (TABLES, page_tables(info.memory_size, info.c_mask, info.ghcbs)),
        (STACKS, bytes(STACK_SIZE * info.vcpus)),
        (TSS, task_states(info.vcpus)),
    ):
        for at in range(0, len(data), PAGE):
            found[gpa + at] = data[at : at + PAGE].ljust(PAGE, b"\0")
    return found


def contents(info: BootInfo, image: Image) -> dict[int, bytes | memoryview]:
    """Everything a guest of our contract starts with, `{gpa: data}` in ascending order: whole pages, in pieces that do not
    overlap. The image's own bytes are views of it, not copies, and its zeroes (.bss) are views of one buffer.
    """
    found: dict[int, bytes | memoryview] = dict(pages(info, image.symbols))
    for segment in image.segments:
        found.update(_pieces(segment))
    return dict(sorted(found.items()))


def _pieces(segment: Segment) -> Iterator[tuple[int, bytes | memoryview]]:
    """A segment as pieces of whole pages: a first page it begins in the middle of, whole pages, the page its data ends in, zeroes."""
    data, gpa = memoryview(segment.data), segment.gpa
    before = gpa % PAGE
    if before:
        yield gpa - before, (bytes(before) + data[: PAGE - before]).ljust(PAGE, b"\0")
        data, gpa = data[PAGE - before :], gpa - before + PAGE
    whole = len(data) // PAGE * PAGE
    if whole:
        yield gpa, data[:whole]
    if whole < len(data):
        yield gpa + whole, bytes(data[whole:]).ljust(PAGE, b"\0")
    gpa += -(-len(data) // PAGE) * PAGE
    while gpa < segment.end:
        size = min(len(_ZEROES), -(-(segment.end - gpa) // PAGE) * PAGE)
        yield gpa, _ZEROES[:size]
        gpa += size


def gdt(vcpus: int) -> bytes:
    """Null, code, data, and one 16-byte TSS descriptor per vCPU (available, so that a guest may load it again)."""
    table = struct.pack("<3Q", 0, _CODE64, _DATA)
    for vcpu in range(vcpus):
        base = TSS + TSS_STRIDE * vcpu
        low = TSS_LIMIT | (base & 0xFFFFFF) << 16 | 0x89 << 40 | (base >> 24 & 0xFF) << 56
        table += struct.pack("<2Q", low, base >> 32)
    return table


def idt(stubs: int | None) -> bytes:
    """256 interrupt gates; vectors 0 to 31 enter `stubs + 16 * vector`, the others (and all, without stubs) are not present."""
    table = bytearray(16 * 256)
    if stubs is not None:
        for vector in range(32):
            target = stubs + 16 * vector
            struct.pack_into("<HHBBHII", table, 16 * vector, target & 0xFFFF, 8, 0, 0x8E, target >> 16 & 0xFFFF, target >> 32, 0)
    return bytes(table)


def task_states(vcpus: int) -> bytes:
    """The 64-bit TSSs: RSP0 is the top of the vCPU's own stack, no I/O bitmap."""
    table = bytearray(TSS_STRIDE * vcpus)
    for vcpu in range(vcpus):
        struct.pack_into("<Q", table, TSS_STRIDE * vcpu + 4, stack_top(vcpu))
        struct.pack_into("<H", table, TSS_STRIDE * vcpu + 0x66, TSS_LIMIT + 1)
    return bytes(table)


def stack_top(vcpu: int) -> int:
    """First GPA above the stack of `vcpu`."""
    return STACKS + STACK_SIZE * (vcpu + 1)


def page_tables(memory_size: int, c_mask: int, ghcbs: range = range(0)) -> bytes:
    """The identity map, as the bytes from `TABLES` on: PML4, PDPT, eight page tables, then one page directory per GiB in use.

    `ghcbs`: pages that are mapped without the C-bit, as the shared page and the test area are.
    """
    small = SMALL_PAGES_END // LARGE
    directories = sorted({gpa >> 30 for gpa, size in memory_layout(memory_size) for gpa in range(gpa, gpa + size, 1 << 30)} | {HOLE >> 30})
    number = {gib: 2 + small + index for index, gib in enumerate(directories)}
    tables = [[0] * 512 for _ in range(2 + small + len(directories))]

    def entry(index: int) -> int:
        return (TABLES + PAGE * index) | _TABLE | c_mask

    tables[0][0] = entry(1)
    for gib in directories:
        tables[1][gib] = entry(number[gib])
    for gpa, size in memory_layout(memory_size):
        for large in range(max(gpa, SMALL_PAGES_END), gpa + size, LARGE):
            tables[number[large >> 30]][large >> 21 & 511] = large | _LARGE_LEAF | c_mask
    tables[number[HOLE >> 30]][HOLE >> 21 & 511] = HOLE | _LARGE_LEAF
    for table in range(small):
        tables[number[0]][table] = entry(2 + table)
        for index in range(512):
            gpa = table * LARGE + index * PAGE
            shared = gpa == SHARED_PAGE or TEST_AREA <= gpa < TEST_AREA + TEST_SIZE or gpa in ghcbs
            tables[2 + table][index] = gpa | _LEAF | (0 if shared else c_mask)
    tables[2][0] = 0  # a null pointer must fault
    return b"".join(struct.pack("<512Q", *table) for table in tables)


def set_registers(regs: kvm_regs, entry: int, vcpu: int) -> None:
    """General registers at the start of `vcpu`: as after a call of entry(boot info, vcpu)."""
    regs.rip, regs.rsp, regs.rflags = entry, stack_top(vcpu) - 8, 2
    regs.rdi, regs.rsi = BOOT_INFO, vcpu


def set_system_registers(sregs: kvm_sregs, vcpu: int, vcpus: int) -> None:
    """System registers of 64-bit mode, ring 0; what is not named here (APIC base, interrupts) stays as the kernel gave it."""
    set_segment(sregs.cs, 0x08, type=11, s=1, l=1)
    for data in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        set_segment(data, 0x10, type=3, s=1, db=1)
    set_segment(sregs.tr, 0x18 + 16 * vcpu, type=11, s=0, base=TSS + TSS_STRIDE * vcpu, limit=TSS_LIMIT)
    set_segment(sregs.ldt, 0, type=2, s=0, limit=0)
    sregs.ldt.present, sregs.ldt.unusable = 0, 1
    sregs.gdt.base, sregs.gdt.limit = GDT, 0x18 + 16 * vcpus - 1
    sregs.idt.base, sregs.idt.limit = IDT, 16 * 256 - 1
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = _CR0, TABLES, _CR4, _EFER


def set_segment(
    segment: kvm_segment,
    selector: int,
    type: int,
    s: int,
    l: int = 0,  # noqa: E741 -- the field's name
    db: int = 0,
    base: int = 0,
    limit: int = 0xFFFFFFFF,
) -> None:
    """Fill one segment register, present and of ring 0; `limit` is in bytes, G follows from it."""
    segment.base, segment.limit, segment.selector, segment.type = base, limit, selector, type
    segment.present, segment.dpl, segment.s, segment.l, segment.db = 1, 0, s, l, db
    segment.g, segment.avl, segment.unusable = int(limit > 0xFFFFF), 0, 0
