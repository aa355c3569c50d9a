"""The memory cipher: keyed per VM, tweaked per page, in 16-byte blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapi.model.mem.cipher import ROOM, SLACK, UNIT, PageCipher, Workspace
from kvmapi.model.sev.vault import Vault

PAGE = 4096
ZERO = bytes(PAGE)


def test_the_same_plaintext_differs_everywhere() -> None:
    one, two = PageCipher(Vault()), PageCipher(Vault())
    seen = {one.encrypt(0, ZERO), one.encrypt(PAGE, ZERO), two.encrypt(0, ZERO), ZERO}
    assert len(seen) == 4
    page = one.encrypt(0, ZERO)
    assert len({page[at : at + 16] for at in range(0, PAGE, 16)}) == PAGE // 16, "and on every block of a page"


def test_moved_ciphertext_is_garbage() -> None:
    cipher = PageCipher(Vault())
    moved = cipher.decrypt(PAGE, cipher.encrypt(0, ZERO))
    assert moved != ZERO and bytes(16) not in moved
    assert PageCipher(Vault()).decrypt(0, cipher.encrypt(0, ZERO)) != ZERO


def test_one_changed_byte_spoils_its_block_only() -> None:
    cipher = PageCipher(Vault())
    bad = bytearray(cipher.encrypt(0, ZERO))
    bad[100] ^= 1
    plain = cipher.decrypt(0, bytes(bad))
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
    whole = b"".join(cipher.encrypt(page, bytes(PAGE)) for page in range(start, address + len(plain), PAGE))
    zero = cipher.encrypt(address, bytes(len(plain)))
    assert whole[address - start : address - start + len(plain)] == zero


CIPHER = PageCipher(Vault())


def test_parts_inside_a_unit() -> None:
    """What vCPUs and commands use: the same bytes as `encrypt` and `decrypt`, the plaintext in hidden room only."""
    work = Workspace(memoryview(bytearray(ROOM)))
    for address, size in ((0x7F0000000000, PAGE), (0x7F0000003000, PAGE), (0x7F0000001230, 64), (0x7F0000000000, UNIT)):
        plain = bytes(n * 5 & 0xFF for n in range(size))
        part = bytes(CIPHER.encrypt_part(address, plain, work))
        assert part == CIPHER.encrypt(address, plain)
        other = Workspace(memoryview(bytearray(ROOM)))
        got = CIPHER.decrypt_part(address, part, other)
        assert bytes(got) == plain and plain not in bytes(other.open)
        at = address % UNIT
        other.hidden[:] = bytes(ROOM)
        other.hidden[at : at + size] = plain
        assert CIPHER.encrypt_part(address, other.hidden[at : at + size], other) == part, "plaintext that is in its place already"


def test_whole_units() -> None:
    plain = bytes(n * 3 & 0xFF for n in range(3 * UNIT))
    out = memoryview(bytearray(b"\xee" * (3 * UNIT + SLACK)))
    CIPHER.encrypt_into(5 * UNIT, memoryview(plain), out)
    assert bytes(out) == CIPHER.encrypt(5 * UNIT, plain) + b"\xee" * SLACK
    with pytest.raises(TypeError):
        CIPHER.__reduce__()


def test_a_shared_key_is_forgotten_by_the_last() -> None:
    cipher = PageCipher(Vault())
    twin = cipher.shared()
    page = cipher.encrypt(0, ZERO)
    cipher.forget()
    assert twin.decrypt(0, page) == ZERO
    twin.forget()
    with pytest.raises(ValueError, match="gone"):
        twin.decrypt(0, page)
