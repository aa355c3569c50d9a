"""Pages compared by machine code (kvmapi/model/cpu/compare.py)."""

from __future__ import annotations

import ctypes

from kvmapi.model.cpu.compare import Comparison

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
