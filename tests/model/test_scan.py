"""The scanner of sensitive instructions: it never raises, and what it finds lies within the limits of x86."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapi.model.cpu import scan

SENSITIVE = st.sampled_from(
    [b"\xe4\x10", b"\xef", b"\xf3\x6e", b"\x66\xf3\x6d", b"\xf4", b"\x0f\x30", b"\x0f\x32", b"\x0f\xa2", b"\x48\x0f\x30"]
)
CODE = st.lists(st.one_of(st.binary(max_size=12), SENSITIVE), max_size=30).map(b"".join)


@settings(max_examples=200, deadline=None)
@given(CODE, st.sampled_from([16, 32, 64]), st.integers(0, 40))
def test_any_bytes(code: bytes, bits: int, tail: int) -> None:
    usable = max(0, len(code) - tail)
    sites = scan.find(code, usable, bits)
    for at, site in sites.items():
        assert 0 <= at < usable and 1 <= site.length <= scan.MAX_LENGTH + 1
        assert site.size in (1, 2, 4, 8) and site.address_size in (2, 4, 8) and 0 <= site.segment <= 5
        assert site.port is None or 0 <= site.port <= 255
    # every opcode byte that may start such an instruction by itself is found
    for at, byte in enumerate(code[:usable]):
        if byte in b"\xf4\xec\xed\xee\xef\x6c\x6d\x6e\x6f":
            assert at in sites
        if byte == 0x0F and code[at + 1 : at + 2] in (b"\x30", b"\x32", b"\xa2"):
            assert at in sites


def test_prefixes_make_starts_of_their_own() -> None:
    sites = scan.find(b"\x66\xf3\x6f\x90", 4, 64)  # rep outsw
    assert {at: (site.length, site.size, site.repeat) for at, site in sites.items()} == {0: (3, 2, True), 1: (2, 4, True), 2: (1, 4, False)}


def test_operand_sizes() -> None:
    assert scan.find(b"\xef", 1, 64)[0].size == 4 and scan.find(b"\xef", 1, 16)[0].size == 2
    assert scan.find(b"\x66\xef", 2, 16)[0].size == 4 and scan.find(b"\x67\x6e", 2, 64)[0].address_size == 4
    assert scan.find(b"\x64\x6e", 2, 64)[0].segment == 4


def test_too_many_prefixes_are_no_instruction() -> None:
    """16 bytes are #UD on a CPU: no start that far away."""
    assert min(scan.find(b"\x66" * 20 + b"\xf4", 21, 64)) == 20 - (scan.MAX_LENGTH - 1)


def test_an_instruction_cut_off_by_the_end() -> None:
    assert scan.find(b"\xe4", 1, 64) == {} and scan.find(b"\x0f", 1, 64) == {}
    assert scan.find(b"\xe4\x77", 1, 64)[0].port == 0x77
