"""The memory cipher: keyed per VM, tweaked per page, in 16-byte blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapi.model.mem.cipher import PAGE, PageCipher

ZERO = bytes(PAGE)


def test_the_same_plaintext_differs_everywhere() -> None:
    one, two = PageCipher(), PageCipher()
    seen = {one.encrypt_page(0, ZERO), one.encrypt_page(PAGE, ZERO), two.encrypt_page(0, ZERO), ZERO}
    assert len(seen) == 4
    page = one.encrypt_page(0, ZERO)
    assert len({page[at : at + 16] for at in range(0, PAGE, 16)}) == PAGE // 16, "and on every block of a page"


def test_moved_ciphertext_is_garbage() -> None:
    cipher = PageCipher()
    moved = cipher.decrypt_page(PAGE, cipher.encrypt_page(0, ZERO))
    assert moved != ZERO and bytes(16) not in moved
    assert PageCipher().decrypt_page(0, cipher.encrypt_page(0, ZERO)) != ZERO


def test_one_changed_byte_spoils_its_block_only() -> None:
    cipher = PageCipher()
    bad = bytearray(cipher.encrypt_page(0, ZERO))
    bad[100] ^= 1
    plain = cipher.decrypt_page(0, bytes(bad))
    assert plain[:96] == bytes(96) and plain[112:] == bytes(PAGE - 112) and plain[96:112].count(0) < 8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 600), st.integers(1, 600))
def test_parts_are_the_page(first: int, blocks: int) -> None:
    """Any 16-byte aligned part, over page borders too, is what it is within its whole pages."""
    cipher = CIPHER
    plain = bytes(n * 7 & 0xFF for n in range(blocks * 16))
    address = 0x7F0000000000 + first * 16
    part = cipher.encrypt(address, plain)
    assert cipher.decrypt(address, part) == plain
    start = address & -PAGE
    whole = b"".join(cipher.encrypt_page(page, bytes(PAGE)) for page in range(start, address + len(plain), PAGE))
    zero = cipher.encrypt(address, bytes(len(plain)))
    assert whole[address - start : address - start + len(plain)] == zero


CIPHER = PageCipher()


def test_decrypting_in_place_writes_a_page_and_no_more() -> None:
    room = bytearray(b"\xee" * (PAGE + 15))
    CIPHER.decrypt_page_into(PAGE, CIPHER.encrypt_page(PAGE, b"\x11" * PAGE), memoryview(room))
    assert room == b"\x11" * PAGE + b"\xee" * 15
    with pytest.raises(TypeError):
        CIPHER.__reduce__()
