"""Pages compared by machine code (kvmapi.model.mem.compare.py)."""

from __future__ import annotations

import ctypes

from kvmapi.model.mem.compare import Comparison

PAGE = 4096


def test_each_byte_of_each_page_counts() -> None:
    pages = [bytearray(bytes(range(256)) * 16) for _ in range(3)]
    copies = [bytearray(page) for page in pages]
    comparison = Comparison()
    assert comparison.same()
    for key, (page, copy) in enumerate(zip(pages, copies)):
        comparison.put(key, ctypes.addressof(ctypes.c_char.from_buffer(page)), copy)
    assert comparison.same()
    for page in pages:
        for at in (0, 15, 16, 47, 63, 64, 1000, *range(PAGE - 64, PAGE)):
            page[at] ^= 1
            assert not comparison.same()
            page[at] ^= 1
    assert comparison.same()


def test_pages_replaced_without_a_copy_and_cleared() -> None:
    page, copy = bytearray(PAGE), bytearray(b"\1" * PAGE)
    pointer = ctypes.addressof(ctypes.c_char.from_buffer(page))
    comparison = Comparison()
    comparison.put(5, pointer, copy)
    assert not comparison.same()
    comparison.put(5, pointer, None)
    assert comparison.same()
    comparison.put(5, pointer, copy)
    comparison.clear()
    assert comparison.same()


def test_a_dropped_pair_counts_no_more_and_the_others_do() -> None:
    pages = [bytearray(PAGE) for _ in range(4)]
    copies = [bytearray(PAGE) for _ in pages]
    for gone in range(4):
        for second in range(4):
            comparison = Comparison()
            for key, (page, copy) in enumerate(zip(pages, copies)):
                comparison.put(key, ctypes.addressof(ctypes.c_char.from_buffer(page)), copy)
            left = [key for key in range(4) if key not in (gone, second)]
            for key in {gone: None, second: None}:
                comparison.drop(key)
            for key, page in enumerate(pages):
                page[100] = 1
                assert comparison.same() == (key not in left), (gone, second, key)
                page[100] = 0
            comparison.put(gone, ctypes.addressof(ctypes.c_char.from_buffer(pages[gone])), copies[gone])
            pages[gone][0] = 1
            assert not comparison.same()
            pages[gone][0] = 0
