"""What a guest finds: page tables walked in Python, descriptors taken apart, the boot info page field by field."""

import struct

import pytest

from vmm import boot

C = 1 << 51
ADDRESS = 0x000FFFFFFFFFF000 & ~C


def walk(tables: bytes, gva: int) -> tuple[int, int, list[int]] | None:
    """GPA, page size and the entries on the way, as the CPU would find them; None when not present."""
    table, entries = boot.TABLES, []
    for shift in (39, 30, 21, 12):
        at = table - boot.TABLES + 8 * (gva >> shift & 511)
        (entry,) = struct.unpack_from("<Q", tables, at)
        entries.append(entry)
        if not entry & 1:
            return None
        if shift == 12 or entry & 0x80:
            size = 1 << shift
            return entry & ADDRESS & ~(size - 1) | gva & (size - 1), size, entries
        table = entry & ADDRESS
    return None


@pytest.mark.parametrize("memory", [16 << 20, 64 << 20, 3 << 30, (3 << 30) + (2 << 20), 8 << 30, boot.MAX_MEMORY])
@pytest.mark.parametrize("c_mask", [0, C])
def test_the_map_is_the_identity_over_all_memory(memory: int, c_mask: int) -> None:
    tables = boot.page_tables(memory, c_mask)
    assert boot.TABLES + len(tables) <= boot.STACKS
    for gpa, size in boot.memory_layout(memory):
        for gva in {gpa + 0x1234, gpa + size // 2, gpa + size - 1}:
            found = walk(tables, gva)
            assert found is not None
            assert found[0] == gva
            assert found[1] == (0x1000 if gva < 16 << 20 else 0x200000)
            assert all(entry & 3 == 3 for entry in found[2])
        assert walk(tables, gpa + size) is None or gpa + size == 1 << 32


def test_page_0_is_absent_and_the_hole_is_there() -> None:
    tables = boot.page_tables(64 << 20, C)
    assert walk(tables, 0x10) is None
    found = walk(tables, boot.HOLE + 8)
    assert found is not None
    assert found[0] == boot.HOLE + 8
    assert not found[2][-1] & C


@pytest.mark.parametrize(
    ("gva", "private"),
    [
        (0x1000, True), (boot.TABLES, True), (boot.SHARED_PAGE, False), (boot.SHARED_PAGE + 0x1000, True), (0x100000, True),
        (boot.TEST_AREA - 1, True), (boot.TEST_AREA, False), (boot.TEST_AREA + boot.TEST_SIZE - 1, False), (16 << 20, True),
    ],
)  # fmt: skip
def test_the_c_bit_is_on_every_entry_but_the_leaves_of_what_is_shared(gva: int, private: bool) -> None:
    found = walk(boot.page_tables(64 << 20, C), gva)
    assert found is not None
    *tables, leaf = found[2]
    assert all(entry & C for entry in tables)
    assert bool(leaf & C) is private


def test_boot_info_has_the_fields_of_the_contract() -> None:
    features = boot.FEATURE_HYPERCALL | boot.FEATURE_MSR
    info = boot.BootInfo(vm_type=2, c_mask=C, memory_size=64 << 20, vcpus=3, features=features, arguments=b"leak")
    page = info.page()
    assert len(page) == 4096
    assert page[:8] == b"SEVMMBI1"
    assert struct.unpack_from("<11Q", page, 8) == (
        2, C, 64 << 20, 3, boot.TABLES, 0x5000, 0x800000, 0x800000, 0xD0000000, 3, 0x40000ABC,
    )  # fmt: skip
    assert page[256:261] == b"leak\0"
    assert struct.unpack_from("<Q", page, 96) == (0,), "no GHCBs"
    assert struct.unpack_from("<Q", boot.BootInfo(0, 0, 0, 1, 0).page(), 88) == (0,), "no MSR exits, no MSR"


def test_an_sev_es_guest_finds_a_shared_page_for_each_vcpu() -> None:
    """They are in nobody's way, not among the pages that are measured, and their neighbours are private."""
    info = boot.BootInfo(3, C, 16 << 20, 64, 0)
    assert struct.unpack_from("<Q", info.page(), 96) == (0x400000,)
    assert (info.ghcbs.start, len(info.ghcbs), info.ghcbs.step) == (0x400000, 64, 0x1000)
    pages = boot.pages(info, {})
    assert not set(info.ghcbs) & set(pages)
    tables = b"".join(pages[gpa] for gpa in sorted(pages) if boot.TABLES <= gpa < boot.STACKS)
    for gpa, shared in ((0x3FF000, False), *((gpa, True) for gpa in info.ghcbs), (0x440000, False)):
        found = walk(tables, gpa)
        assert found is not None and found[:2] == (gpa, 0x1000)
        assert bool(found[2][-1] & C) is not shared
        assert all(entry & C for entry in found[2][:-1])
    for vm_type in (0, 1, 2):
        assert not boot.BootInfo(vm_type, C, 16 << 20, 4, 0).ghcbs


def test_each_vcpu_has_a_tss_of_its_own() -> None:
    gdt, tss = boot.gdt(64), boot.task_states(64)
    assert len(gdt) <= 0x1000
    for vcpu in (0, 1, 63):
        low, high = struct.unpack_from("<2Q", gdt, 0x18 + 16 * vcpu)
        base = low >> 16 & 0xFFFFFF | low >> 56 << 24 | high << 32
        assert base == 0xC0000 + 128 * vcpu
        assert low >> 40 & 0xFF == 0x89
        assert struct.unpack_from("<Q", tss, 128 * vcpu + 4) == (0x40000 + 0x2000 * (vcpu + 1),)


def test_gates_enter_the_stubs_and_are_absent_without_them() -> None:
    table = boot.idt(0x123456789000)
    for vector in (0, 14, 31):
        low, selector, _, kind, middle, high, _ = struct.unpack_from("<HHBBHII", table, 16 * vector)
        assert low | middle << 16 | high << 32 == 0x123456789000 + 16 * vector
        assert (selector, kind) == (8, 0x8E)
    assert table[16 * 32 :] == bytes(16 * 224)
    assert boot.idt(None) == bytes(4096)


def test_the_pages_do_not_overlap_and_leave_out_what_is_shared() -> None:
    pages = boot.pages(boot.BootInfo(2, C, 64 << 20, 64, 0), {"vector_stubs": 0x100000})
    assert all(gpa % 4096 == 0 and len(data) == 4096 for gpa, data in pages.items())
    assert boot.SHARED_PAGE not in pages
    assert max(pages) < 0x100000
    assert {0x1000, 0x2000, 0x4000, 0x8000, 0x40000, 0xBF000, 0xC0000, 0xC1000} <= set(pages)
