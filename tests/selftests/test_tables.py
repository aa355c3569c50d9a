"""Mappings of a test's own: which entries they become, and what they leave alone."""

from __future__ import annotations

import pytest

from vmm import boot
from vmm.selftests.tables import PAGE_2M, PAGE_4K, TABLES_END, TABLES_MORE, PageTables, TableSpaceError

C = 1 << 51


@pytest.fixture
def tables() -> PageTables:
    info = boot.BootInfo(vm_type=2, c_mask=C, memory_size=64 << 20, vcpus=1, features=0)
    return PageTables(dict(boot.pages(info, {})), C)


def test_a_mapping_far_away_gets_tables_of_its_own_with_the_c_bit(tables: PageTables) -> None:
    assert tables.entry(0x7F0000000000) == 0
    tables.map(0x7F0000000000, 0xC0000000, 2 * PAGE_4K, private=True)
    assert tables.entry(0x7F0000000000) == 0xC0000000 | C | 0x63
    assert tables.entry(0x7F0000001000) == 0xC0001000 | C | 0x63
    assert tables.entry(0x7F0000002000) == 0
    assert sorted(tables.changed) == [boot.TABLES, TABLES_MORE, TABLES_MORE + 0x1000, TABLES_MORE + 0x2000]
    assert int.from_bytes(tables.pages[TABLES_MORE][0:8], "little") == TABLES_MORE + 0x1000 | C | 0x63


def test_shared_pages_have_no_c_bit(tables: PageTables) -> None:
    tables.map(0xB0000000, 0xB0000000, PAGE_2M, private=False, page=PAGE_2M)
    assert tables.entry(0xB0000000) == 0xB0000000 | 0xE3


def test_a_page_within_a_large_one_splits_it_and_leaves_its_neighbours(tables: PageTables) -> None:
    before = tables.entry(0x2000000)
    assert before == 0x2000000 | C | 0xE3
    tables.map(0x2003000, 0xC0000000, PAGE_4K, private=False)
    assert tables.entry(0x2003000) == 0xC0000000 | 0x63
    assert tables.entry(0x2002000) == 0x2002000 | C | 0x63
    assert tables.entry(0x2004000) == 0x2004000 | C | 0x63
    assert tables.entry(0x21FF000) == 0x21FF000 | C | 0x63
    assert tables.entry(0x2200000) == 0x2200000 | C | 0xE3


@pytest.mark.parametrize(
    ("gva", "gpa", "size", "page"),
    [(1, 0, 4096, 4096), (0, 8, 4096, 4096), (0, 0, 0, 4096), (0, 4096, PAGE_2M, PAGE_2M), (0, 0, 4096, 8192)],
)
def test_misaligned_mappings_are_refused(tables: PageTables, gva: int, gpa: int, size: int, page: int) -> None:
    with pytest.raises(TableSpaceError, match="not multiples of a page"):
        tables.map(gva, gpa, size, False, page)
    assert not tables.changed


def test_there_is_an_end_to_the_room_for_tables(tables: PageTables) -> None:
    with pytest.raises(TableSpaceError, match="use 2 MiB pages"):
        tables.map(1 << 40, 1 << 32, (TABLES_END - TABLES_MORE) // 8 * PAGE_4K, False)
